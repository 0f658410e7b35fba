"""`muonwire compare`: many recipes, the same work for each, and one report."""

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from muonwire import __version__
from muonwire.compare.config import CompareConfig, Comparison
from muonwire.compare.emulate import emulate, on_hosts
from muonwire.compare.hosts import lacking
from muonwire.compare.links import link_curves, link_summary, stops_of, target_of
from muonwire.compare.report import ReportSetting, write_compare_report
from muonwire.compare.runs import Run, pending
from muonwire.compare.summary import curves, summarize
from muonwire.compare.virtual import run_virtual
from muonwire.compare.worker import worker
from muonwire.errors import ExchangeError, StoppedError, UsageError
from muonwire.tasks import Task, TaskSettings
from muonwire.train.checkpoint import write_json
from muonwire.train.launch import launch

RESULTS = "results.parquet"
LINKS = "links.parquet"
SUMMARY = "summary.json"
# What the runs in a folder were trained on.
TRAINED_ON = "tasks.json"


def machine() -> str:
    """The processor, its cores, and the GPU where there is one."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = f"{names[0]}, {len(names)} cores" if names else name
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def write_tables(config: Comparison, *, command: str) -> list[dict[str, Any]]:
    """Write summary.json, results.parquet, the charts and report.html of what is finished; return the summary."""
    summary, frame = summarize(config), curves(config)
    links = None
    config.out.mkdir(parents=True, exist_ok=True)
    if config.emulate:
        target = target_of(config, summary, frame)
        links = link_curves(config, target)
        found = link_summary(config, target, links)
        for entry in summary:
            entry["links"] = found.get(Run(entry["recipe"], entry["lr"], entry["seed"]), {})
        links.write_parquet(config.out / LINKS)
    write_json(config.out / SUMMARY, summary)
    frame.write_parquet(config.out / RESULTS)
    if summary:
        write_compare_report(
            config.out, setting=_setting(config, command, summary), summary=summary, curves=frame, links=links
        )
    return summary


def _setting(config: Comparison, command: str, summary: list[dict[str, Any]]) -> ReportSetting:
    task = config.task.make()
    about = task.about
    notes = []
    if config.virtual:
        notes.append(
            "The replicas of a run took turns on one core (--virtual): times here add up over the replicas; bytes, "
            "losses and times at the link are those of replicas of their own."
        )
    if config.peers:
        notes.append(
            f"{', '.join(config.peers)}: bytes as the kernel counted them at each replica's interface, without the headers of "
            "Ethernet, IP and TCP; messages as their algorithms have them; their exchange is part of compute and optimizer."
        )
    notes += _notes_on_links(config, summary)
    planned = sum(len(config.seeds_of(recipe)) for recipe in config.recipes)
    if len(summary) < planned:
        notes.append(
            f"{planned - len(summary)} of {planned} runs are missing: run the command again to finish them."
        )
    return ReportSetting(
        title="Recipes compared on the same work",
        command=command,
        task=about.task,
        model=f"{about.model}, {summary[0]['num_parameters']:,} trainable parameters",
        replicas=config.replicas,
        steps=config.steps,
        batch_terms=task.batch_terms * config.replicas,
        terms=about.terms,
        lr_grid=config.known_rates or config.lr_grid,
        lr_searched=config.lr_grid if config.known_rates else (),
        seeds=config.seeds,
        link=config.link,
        machine=machine(),
        versions={"muonwire": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        notes=notes,
        reference=config.recipes[0],
        subject=next((r for r in config.recipes if r.startswith(("one_bit_muon", "local_muon"))), None),
    )


def check_data(out: Path, settings: TaskSettings, task: Task) -> None:
    """Note what the runs in a folder are trained on, or make sure that it is the same as before.

    Args:
        out: of the comparison; it is there.
        settings: of the task.
        task: made of them.

    Raises:
        UsageError: the files or the model that the settings name hold something else now, so that runs that are kept there would be
            compared with others.
    """
    path = out / TRAINED_ON
    notes: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    own = json.loads(json.dumps({"settings": settings.identity(), "task": task.description}))
    before = next((note["task"] for note in notes if note["settings"] == own["settings"]), None)
    if before is None:
        write_json(path, [*notes, own])
        return
    now = own["task"]
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        what = ", ".join(f"{key} ({before.get(key)} then, {now.get(key)} now)" for key in changed)
        raise UsageError(
            f"compare: the data or the model has changed since runs were kept in {out}: {what}; give another --out, or put back "
            "what was there"
        )


def _notes_on_links(config: Comparison, summary: list[dict[str, Any]]) -> list[str]:
    """Whether the links were emulated, and how the kernel's counters agree with the meter."""
    entries = [found for entry in summary for found in entry.get("links", {}).values()]
    if not entries:
        return []
    emulated = [found for found in entries if found["emulated"]]
    if not emulated:
        return [
            f"Times at {', '.join(config.emulate)} are modelled: {lacking() or 'the runs on them are not done'}."
        ]
    notes = []
    ratios = [found["kernel_over_meter"] for found in emulated if found["kernel_over_meter"] is not None]
    if ratios:
        low, high = (100 * (pick(ratios) - 1) for pick in (min, max))
        notes.append(
            "What the kernel counted as sent on the emulated links, without the headers of Ethernet, IP and TCP, is "
            f"{low:+.2f} % to {high:+.2f} % off what the transport's meter counted with gloo's headers."
        )
    changed = sum(not found["same_losses"] for found in emulated)
    notes.append(
        "The losses on the emulated links are those without one, to the last bit."
        if not changed
        else f"In {changed} of {len(emulated)} runs on emulated links the losses differ from those without one."
    )
    notes.append(
        f"TCP's congestion control: {', '.join(sorted({e['congestion_control'] for e in emulated}))}."
    )
    return notes


def compare(settings: CompareConfig, *, command: str) -> list[dict[str, Any]]:
    """Do what is not done yet, then write the tables and the report; return the summary.

    Finished runs are kept and not repeated; a run that was cut off goes on from its checkpoint.

    Args:
        settings: what to compare; what they leave open comes from their preset.
        command: how to call this again, for the report.

    Raises:
        UsageError: bad settings or data, other data than that of runs which are kept, peers where network namespaces are not
            allowed, or hosts where there is a GPU; before anything is trained.
        ReplicaLostError, ExchangeError: a replica was lost; the report shows what was finished before.
        StoppedError: SIGTERM or Ctrl-C; likewise.
    """
    config = settings.resolve()
    task = config.task.make()
    config.out.mkdir(parents=True, exist_ok=True)
    check_data(config.out, config.task, task)
    lacks = lacking() if config.emulate or config.peers else ""
    if lacks and config.peers:
        raise UsageError(
            f"compare: the bytes of peers are counted at network interfaces of their own, which cannot be made here: {lacks}; "
            "leave out --peers, or run as root on Linux"
        )
    if (config.emulate or config.peers) and torch.cuda.is_available():
        raise UsageError(
            "compare: replicas on hosts of their own talk through gloo, on the CPU, and this machine has a GPU; hide it with "
            "CUDA_VISIBLE_DEVICES= before the command"
        )
    try:
        if pending(config, peers=False):
            if config.virtual:
                run_virtual(config)
            elif config.replicas == 1:
                worker(config)
            else:
                launch(
                    worker, (config,), replicas=config.replicas, port=config.port, modules=config.task.modules
                )
        if pending(config, peers=True):
            on_hosts(worker, (config, True), config, link=None)
        if lacks:
            print(
                f"warning: the links cannot be emulated here: {lacks}; times at {', '.join(config.emulate)} are modelled",
                file=sys.stderr,
            )
        elif config.emulate:
            emulate(config, stops_of(target_of(config, summarize(config), curves(config))))
    except (ExchangeError, StoppedError):
        write_tables(config, command=command)
        raise
    return write_tables(config, command=command)
