"""`muonwire compare`: many recipes, the same work for each, and one report."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from muonwire import __version__
from muonwire.compare.config import CompareConfig, Comparison
from muonwire.compare.report import ReportSetting, write_compare_report
from muonwire.compare.runs import pending
from muonwire.compare.summary import curves, summarize
from muonwire.compare.virtual import run_virtual
from muonwire.compare.worker import worker
from muonwire.errors import ExchangeError, StoppedError
from muonwire.train.checkpoint import write_json
from muonwire.train.launch import launch

RESULTS = "results.parquet"
SUMMARY = "summary.json"


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
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / SUMMARY, summary)
    frame.write_parquet(config.out / RESULTS)
    if summary:
        write_compare_report(
            config.out, setting=_setting(config, command, summary), summary=summary, curves=frame
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


def compare(settings: CompareConfig, *, command: str) -> list[dict[str, Any]]:
    """Do what is not done yet, then write the tables and the report; return the summary.

    Finished runs are kept and not repeated; a run that was cut off goes on from its checkpoint.

    Args:
        settings: what to compare; what they leave open comes from their preset.
        command: how to call this again, for the report.

    Raises:
        UsageError: bad settings or data, before anything is trained.
        ReplicaLostError, ExchangeError: a replica was lost; the report shows what was finished before.
        StoppedError: SIGTERM or Ctrl-C; likewise.
    """
    config = settings.resolve()
    config.task.make()
    config.out.mkdir(parents=True, exist_ok=True)
    try:
        if pending(config):
            if config.virtual:
                run_virtual(config)
            elif config.replicas == 1:
                worker(config)
            else:
                launch(worker, (config,), replicas=config.replicas, port=config.port)
    except (ExchangeError, StoppedError):
        write_tables(config, command=command)
        raise
    return write_tables(config, command=command)
