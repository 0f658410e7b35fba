"""One run of a peer: the loop of ``muonwire.train`` in small, with a peer in place of an optimizer."""

import math
import os
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from muonwire.compare.measured import Measurement, Spent
from muonwire.compare.peers.base import Replica
from muonwire.compare.peers.table import find_peer
from muonwire.errors import StoppedError, UsageError
from muonwire.tasks import Task, TaskSettings, TextSettings
from muonwire.train.checkpoint import write_json
from muonwire.train.compiled import compiled
from muonwire.train.loop import RESULT, Progress, RunResult
from muonwire.train.metrics import finite_or_none, metrics_writer
from muonwire.train.schedule import lr_factor
from muonwire.transport import Transport, digest_all
from muonwire.transport.interfaces import interface_to

_EVALUATION = struct.Struct("<dqdq")


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """The settings of one run of a peer; as in TrainConfig, with the peer in place of the recipe.

    Raises:
        UsageError: an unknown peer or option, a rate that is not positive, or steps that the peer cannot do.
    """

    peer: str
    lr: float
    steps: int
    seed: int = 0
    warmup_steps: int = 10
    lr_floor: float = 0.1
    evaluate_every: int = 50
    compile: bool = False
    task: TaskSettings = field(default_factory=TextSettings)

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UsageError(f"compare: lr is {self.lr}; it must be positive")
        find_peer(self.peer).check(steps=self.steps)

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a share of its peak."""
        return lr_factor(
            step, steps=self.steps, warmup_steps=self.warmup_steps, kind="cosine", floor=self.lr_floor
        )

    def identity(self) -> dict[str, Any]:
        """What decides the outcome of the run, as JSON has it."""
        settings = {**asdict(self), "task": self.task.identity()}
        if not self.compile:
            del settings["compile"]
        return settings


class PeerTrainer:
    """Trains a peer on one of the replicas; it begins anew where a run was cut off, since peers leave no checkpoints.

    Args:
        config: the settings.
        task: data, model and loss.
        transport: between the replicas, for evaluation.
        folder: of the run, where the first replica writes.
        stop_after: a step, of those that are evaluated, after which the run ends. Default: the last one.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        config: PeerConfig,
        task: Task,
        transport: Transport,
        folder: Path,
        *,
        stop_after: int | None = None,
    ) -> None:
        self.config, self.task, self.transport, self.folder = config, task, transport, folder
        self.stop_after = config.steps if stop_after is None else stop_after
        self.step = 0
        self.model = task.build_model(seed=config.seed)
        torch.manual_seed(config.seed * 1000 + transport.rank)
        self.settings = find_peer(config.peer)
        self.measurement = Measurement(folder, transport)
        self._compute_times: list[float] = []
        self._step_times: list[float] = []
        self._losses: list[float] = []
        self._stopping = False

    def request_stop(self) -> None:
        """End after this step."""
        self._stopping = True

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> RunResult:
        """Train; write and return the result.

        Raises:
            StoppedError: it was asked to stop.
        """
        config, transport = self.config, self.transport
        master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        address = interface_to(master, 1).address if transport.world_size > 1 else "127.0.0.1"
        forward: Any = compiled(self.model, torch.device("cpu")) if config.compile else self.model
        peer = self.settings.start(
            Replica(
                model=self.model,
                forward=forward,
                lr=config.lr,
                rank=transport.rank,
                world_size=transport.world_size,
                master=master,
                address=address,
            )
        )
        peaks = [[float(g["lr"]) for g in optimizer.param_groups] for optimizer in peer.optimizers]
        loss: float | None = None
        digested = ""
        try:
            with metrics_writer(
                self.folder, after_step=0, tensorboard=False, enabled=transport.rank == 0
            ) as write:
                with peer.shared_weights():
                    loss, _ = self._evaluate()
                write(0, **self._totals(), eval_loss=loss)
                while self.step < self.stop_after:
                    factor = config.lr_factor(self.step + 1)
                    for optimizer, lrs in zip(peer.optimizers, peaks, strict=True):
                        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                            group["lr"] = lr * factor
                    self._one_step(peer)
                    loss = None
                    if self.step % config.evaluate_every == 0 or self.step == config.steps:
                        with peer.shared_weights():
                            loss, train_loss = self._evaluate()
                            digested = digest_all(self.model.named_parameters()).hex()
                        write(self.step, **self._totals(), eval_loss=loss, train_loss=train_loss)
                    if on_progress is not None:
                        on_progress(
                            Progress(
                                step=self.step,
                                steps=config.steps,
                                train_loss=self._last_loss,
                                eval_loss=loss,
                            )
                        )
                    if loss is not None and not math.isfinite(loss):
                        break
                    if self._stopping:
                        raise StoppedError(f"stopped after step {self.step}")
        finally:
            peer.close()
        return self._result(loss, digested)

    def _one_step(self, peer: Any) -> None:
        self.measurement.begin()
        config, transport = self.config, self.transport
        step = self.step + 1
        start_s = time.perf_counter()
        batch = self.task.batch(
            seed=config.seed, step=step, rank=transport.rank, world_size=transport.world_size
        )
        loss = self.task.loss(peer.compute, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._last_loss = float(loss.detach())
        computed_s = time.perf_counter()
        peer.step()
        for optimizer in peer.optimizers:
            optimizer.zero_grad()
        self._compute_times.append(computed_s - start_s)
        self._step_times.append(time.perf_counter() - computed_s)
        self._losses.append(self._last_loss)
        self.step = step

    def _evaluate(self) -> tuple[float, float | None]:
        """Mean evaluation loss of the weights that the model holds, and mean training loss since the last evaluation."""
        transport = self.transport
        self.measurement.close(self.step, sum(self._compute_times) + sum(self._step_times))
        total, terms = self.task.evaluate(self.model, rank=transport.rank, world_size=transport.world_size)
        message = _EVALUATION.pack(total, terms, sum(self._losses), len(self._losses))
        self._losses = []
        gathered = transport.gather(message, purpose="control")
        sums = [sum(column) for column in zip(*(_EVALUATION.unpack(g) for g in gathered), strict=True)]
        return sums[0] / sums[1], sums[2] / sums[3] if sums[3] else None

    def _totals(self) -> dict[str, float]:
        """What was spent so far, named as the trainer of recipes does: times of this replica, bytes as means over the replicas."""
        replicas = self.measurement.replicas
        egress = fmean(map(trained_egress_bytes, replicas))
        return {
            "compute_s": sum(self._compute_times),
            # Exchanges cannot be told from what surrounds them.
            "optimizer_s": sum(self._step_times),
            "exchange_s": 0.0,
            "sent_bytes": egress,
            "egress_bytes": egress,
            "received_bytes": fmean(map(trained_received_bytes, replicas)),
            "num_messages": self.step * self.settings.rounds_per_step(self.transport.world_size),
        }

    def _result(self, loss: float | None, digested: str) -> RunResult:
        totals, steps = self._totals(), max(self.step, 1)
        num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        diverged = loss is not None and not math.isfinite(loss)
        finished = diverged or self.step >= self.config.steps
        result = RunResult(
            config=self.config.identity(),
            replicas=self.transport.world_size,
            steps=self.step,
            finished=finished,
            diverged=diverged,
            final_eval_loss=finite_or_none(loss) if self.step >= self.config.steps else None,
            num_parameters=num_parameters,
            bytes_sent_per_step=totals["sent_bytes"] / steps,
            bytes_egress_per_step=totals["egress_bytes"] / steps,
            bytes_received_per_step=totals["received_bytes"] / steps,
            messages_per_step=totals["num_messages"] / steps,
            bits_per_parameter_step=8 * totals["sent_bytes"] / steps / num_parameters,
            compute_s_per_step=median(self._compute_times or [0.0]),
            optimizer_s_per_step=fmean(self._step_times or [0.0]),
            exchange_s_per_step=0.0,
            weights_digest=digested,
            optimizer=f"{self.settings.summary}\n{self.settings}",
            diagnostics={},
        )
        if self.transport.rank == 0 and finished:
            write_json(self.folder / RESULT, asdict(result))
        return result


def trained_egress_bytes(spent: Spent) -> int:
    """What the kernel counted as sent, without the control traffic."""
    return spent.kernel.egress_bytes - spent.control_egress_bytes


def trained_received_bytes(spent: Spent) -> int:
    """What the kernel counted as received, without the control traffic."""
    return spent.kernel.received_bytes - spent.control_received_bytes
