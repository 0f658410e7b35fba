"""Runs on emulated links: each replica on a host of its own in a network namespace, and the time measured.

A link changes the time of a run and nothing else, so the rates are sought without one, and only the best rate of each recipe is
trained again on each link. A run ends where it reaches the loss at which the first recipe ended; one that never does, and the first
recipe itself, train all steps.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from typing_extensions import override

from muonwire.compare.config import Comparison
from muonwire.compare.hosts import Host, hosts
from muonwire.compare.measured import MEASURED, Measurement
from muonwire.compare.peers.train import PeerTrainer, trained_egress_bytes, trained_received_bytes
from muonwire.compare.runs import (
    Run,
    best_lr,
    find_result,
    finish_run,
    prepare_peer,
    prepare_run,
    run_folder,
    stopped,
)
from muonwire.tasks import Task
from muonwire.train.checkpoint import write_json
from muonwire.train.config import TrainConfig
from muonwire.train.launch import launch, on_stop_signal, process_group, set_threads
from muonwire.train.loop import RunResult, Trainer
from muonwire.train.metrics import read_lines, read_metrics
from muonwire.train.progress import progress_bar
from muonwire.transport import Link, Transport
from muonwire.transport.waiting import watching

EMULATED = "emulated"
RESULT = "emulated.json"
# Inside the namespaces every port is free.
PORT = 29500


class MeasuredTrainer(Trainer):
    """A trainer whose time and bytes are taken between evaluations; see Measurement.

    Args:
        config, task, transport, folder, device: as Trainer's.
        stop_after: a step, of those that are evaluated, after which the run ends.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        transport: Transport,
        folder: Path,
        *,
        stop_after: int,
        device: torch.device | str | None = None,
    ) -> None:
        # Probes add exchanges, and their results are known from the run without a link.
        super().__init__(replace(config, probes=0), task, transport, folder, device=device)
        self.stop_after = stop_after
        self._measurement: Measurement | None = None

    @property
    def measurement(self) -> Measurement:
        """Of this run, from where it was cut off."""
        if self._measurement is None:
            self._measurement = Measurement(self.folder, self.transport, after_step=self.step)
        return self._measurement

    @property
    @override
    def stops(self) -> bool:
        return super().stops or self.step >= self.stop_after

    @override
    def _one_step(self) -> tuple[float, float]:
        self.measurement.begin()
        return super()._one_step()

    @override
    def _evaluate(self) -> tuple[float | None, float | None]:
        totals = self._totals
        self.measurement.close(self.step, totals.compute_s + totals.optimizer_s + totals.exchange_s)
        return super()._evaluate()


def emulated_out(config: Comparison, link: str) -> Path:
    """Where the runs on a link live, each in a folder as without one."""
    return config.out / EMULATED / link.replace("/", "_").replace(":", "-")


def emulated_folder(config: Comparison, run: Run, link: str) -> Path:
    """Where one run on a link lives."""
    return run_folder(emulated_out(config, link), *run)


def read_emulated(config: Comparison, run: Run, link: str, *, stop_after: int) -> dict[str, Any] | None:
    """What a run on a link came to, if it is there and went on for as long; else None."""
    try:
        record: dict[str, Any] = json.loads((emulated_folder(config, run, link) / RESULT).read_text())
    except (OSError, ValueError):
        return None
    settings = config.run_config(run.recipe, run.lr, run.seed).identity()
    same = (
        record["config"] == json.loads(json.dumps(settings))
        and record["replicas"] == config.replicas
        and record["link"] == link
    )
    return record if same and record["steps"] >= stop_after else None


def emulated_runs(config: Comparison, stops: Mapping[str, int]) -> list[tuple[Run, int]]:
    """The runs that are to be trained on every link, with the step after which each may end.

    Args:
        config: the comparison, whose runs without a link are finished.
        stops: that step by recipe, of those that reach the target.
    """
    find = find_result(config)
    runs = []
    for recipe in config.recipes:
        lr = best_lr(config, recipe, find)
        for seed in config.seeds_of(recipe) if lr is not None else ():
            assert lr is not None
            result = find(Run(recipe, lr, seed))
            if result is not None and result["final_eval_loss"] is not None:
                runs.append((Run(recipe, lr, seed), stops.get(recipe, config.steps)))
    return runs


def emulate(config: Comparison, stops: Mapping[str, int]) -> None:
    """Train what is left to train on each link.

    Args:
        config: the comparison, whose runs without a link are finished.
        stops: by recipe, the step at which it reaches the target.

    Raises:
        ReplicaLostError, ExchangeError: a replica was lost.
        StoppedError: SIGTERM or Ctrl-C; finished runs are kept, and the one that was under way leaves a checkpoint.
    """
    for link in config.emulate:
        left = [
            (run, stop)
            for run, stop in emulated_runs(config, stops)
            if config.emulate_recipes is None or run.recipe in config.emulate_recipes
            if read_emulated(config, run, link, stop_after=stop) is None
        ]
        if left:
            on_hosts(_worker, (config, link, left), config, link=Link.parse(link))


def on_hosts(
    worker: Callable[..., None], args: Sequence[Any], config: Comparison, *, link: Link | None
) -> None:
    """``launch`` with each replica on a host of its own; the hosts are gone afterwards, however it ends.

    Args:
        worker: see ``launch``.
        args: likewise.
        config: of the comparison, with the number of replicas.
        link: of each host. Default: as fast as the machine carries.
    """
    with stop_signals_raise(config), hosts(config.replicas, link=link, rate="") as made:
        launch(partial(_on_host, made, worker), args, replicas=config.replicas, modules=config.task.modules)


@contextmanager
def stop_signals_raise(config: Comparison) -> Iterator[None]:
    """Within the block SIGTERM raises StoppedError, so that what was set up is taken down."""

    def stop(_number: int, _frame: Any) -> None:
        raise stopped(config)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _on_host(made: Sequence[Host], worker: Callable[..., None], *args: Any) -> None:
    """What a replica's process does first: it goes to its host, where the first one is the master."""
    made[int(os.environ["RANK"])].enter()
    os.environ.update(
        MASTER_ADDR=made[0].address, MASTER_PORT=str(PORT), TORCHELASTIC_USE_AGENT_STORE="False"
    )
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    worker(*args)


def _worker(config: Comparison, link: str, runs: Sequence[tuple[Run, int]]) -> None:
    """All runs that are left on a link, one after the other, on one of the replicas."""
    task = config.task.make()
    first = os.environ["RANK"] == "0"
    with process_group() as make_transport:
        set_threads(config.replicas, config.threads)
        for run, stop_after in runs:
            transport = make_transport()
            out, make = emulated_out(config, link), partial(MeasuredTrainer, stop_after=stop_after)
            trainer: Trainer | PeerTrainer
            if run.recipe in config.peers:
                trainer = prepare_peer(config, run, task, transport, out=out, stop_after=stop_after)
            else:
                trainer = prepare_run(config, run, task, transport, make=make, out=out)
            with (
                on_stop_signal(trainer.request_stop),
                progress_bar(f"{link}: {run}", enabled=first, lines=False) as show,
                watching(transport.waits, say=show.say, show=show.wait, first_s=60.0),
            ):
                result = trainer.run(show)
            assert isinstance(trainer, MeasuredTrainer | PeerTrainer)
            if not result.diverged and result.steps < stop_after:
                raise stopped(config)
            record = _record(trainer, result, link)
            if first:
                write_json(trainer.folder / RESULT, record)
                print(
                    f"{link}: {run}: {result.steps} steps in {record['measured_s']:.1f} s of training",
                    flush=True,
                )
            finish_run(trainer, replace(result, finished=True))


def _record(trainer: "MeasuredTrainer | PeerTrainer", result: RunResult, link: str) -> dict[str, Any]:
    """What a run on a link came to; bytes and retransmissions are means over the replicas."""
    measurement = trainer.measurement
    steps, replicas = max(result.steps, 1), measurement.replicas
    is_peer = isinstance(trainer, PeerTrainer)
    metered = sum(s.on_the_wire(peers=len(replicas) - 1) for s in replicas)
    return {
        **asdict(result),
        "link": link,
        "measured_s": measurement.measured_s,
        "kernel_egress_bytes_per_step": fmean(map(trained_egress_bytes, replicas)) / steps,
        "kernel_received_bytes_per_step": fmean(map(trained_received_bytes, replicas)) / steps,
        # Of everything between the first and the last step of each part, control traffic too; a peer has no meter.
        "kernel_over_meter": None
        if is_peer or not metered
        else sum(s.kernel.egress_bytes for s in replicas) / metered,
        "retransmitted_segments": fmean(s.kernel.retransmitted for s in replicas),
        "congestion_control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
    }


def emulated_metrics(config: Comparison, run: Run, link: str) -> list[dict[str, Any]]:
    """The evaluations of a run on a link: its metrics, with ``measured_s`` of training so far."""
    folder = emulated_folder(config, run, link)
    measured = {line["step"]: line["measured_s"] for line in read_lines(folder / MEASURED)}
    return [
        {**record, "measured_s": measured[record["step"]]}
        for record in read_metrics(folder)
        if "eval_loss" in record and record["step"] in measured
    ]
