"""One training run: the loop, its measurements, checkpoints and resumption."""

import math
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from muonwire import recipes
from muonwire.errors import NonFiniteUpdateError
from muonwire.optim import sharing
from muonwire.optim.prometheus import PrometheusFile
from muonwire.tasks.base import Task
from muonwire.train import checkpoint, resume
from muonwire.train.accumulate import accumulate, split_batch
from muonwire.train.compiled import compiled
from muonwire.train.config import TrainConfig
from muonwire.train.diagnostics import Diagnostics
from muonwire.train.events import Events
from muonwire.train.figures import SynchronizationFigures
from muonwire.train.folders import Together
from muonwire.train.intervals import IntervalRecord
from muonwire.train.lengths import LENGTHS, STEPS, Length
from muonwire.train.metrics import finite_or_none, metrics_writer
from muonwire.transport import Flag, Traffic, Transport, check_replicas, site_transport
from muonwire.transport.generators import random_state, set_random_state

RESULT = "result.json"
_EVALUATION = struct.Struct("<dqdq")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to. Bytes are means per replica and optimizer step, times medians per step of this replica.

    Args:
        config: the identity of the run's settings; with ``lengths`` where a resume changed its number of steps.
        replicas: how many trained together.
        steps: done.
        finished: False where the run was asked to stop before its last step.
        diverged: a loss or an update became non-finite.
        final_eval_loss: of the shared weights after the last step; None where diverged or not finished.
        num_parameters: trainable ones.
        bytes_sent_per_step, bytes_egress_per_step, bytes_received_per_step, messages_per_step: see ``Traffic``; of training,
            without evaluation.
        bits_per_parameter_step: 8 × bytes_sent_per_step / num_parameters.
        compute_s_per_step: forward and backward.
        optimizer_s_per_step: the optimizer without its exchanges, codecs included.
        exchange_s_per_step: in exchanges, waiting for the others included (a mean over the steps).
        weights_digest: of the shared weights at the end.
        optimizer: the optimizer's chains, readable, with the peak learning rate.
        diagnostics: means over the probes, by measure; see ``Diagnostics``.
        sites: how many the replicas make; None where each is by itself. The bytes above are then those that a site sends and
            receives, and the bits those between sites.
        bytes_inside_per_step: that left the first replica for others of its site.
    """

    config: dict[str, Any]
    replicas: int
    steps: int
    finished: bool
    diverged: bool
    final_eval_loss: float | None
    num_parameters: int
    bytes_sent_per_step: float
    bytes_egress_per_step: float
    bytes_received_per_step: float
    messages_per_step: float
    bits_per_parameter_step: float
    compute_s_per_step: float
    optimizer_s_per_step: float
    exchange_s_per_step: float
    weights_digest: str
    optimizer: str
    diagnostics: dict[str, float | None]
    sites: int | None = None
    bytes_inside_per_step: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a progress display may want to know after a step.

    ``wait_share`` is the share of the time since the start in which this replica stood still for others; None where it is alone.
    """

    step: int
    steps: int
    train_loss: float
    eval_loss: float | None
    wait_share: float | None = None


@dataclass
class _Totals:
    """What accumulates over a run and is carried by its checkpoints."""

    compute_s: float = 0.0
    optimizer_s: float = 0.0
    exchange_s: float = 0.0
    overlap_s: float = 0.0
    sent_bytes: int = 0
    egress_bytes: int = 0
    received_bytes: int = 0
    num_messages: int = 0
    inside_bytes: int = 0

    def add(self, traffic: Traffic, *, compute_s: float, optimizer_s: float) -> None:
        """Count what a step of training sent and received, and the seconds that its parts took."""
        self.compute_s += compute_s
        self.optimizer_s += optimizer_s
        self.exchange_s += traffic.wait_s
        self.overlap_s += traffic.overlap_s
        self.sent_bytes += traffic.sent_bytes
        self.egress_bytes += traffic.egress_bytes
        self.received_bytes += traffic.received_bytes
        self.num_messages += traffic.num_messages


class Trainer:
    """Trains one recipe on one task, on one of the replicas.

    Args:
        config: the settings.
        task: data, model and loss.
        transport: a fresh one, between the replicas of this run.
        folder: where this replica's checkpoints go, and replica 0's metrics and result; one folder for
            all replicas, or one on every host.
        device: of the model. Default: a GPU where there is one.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        transport: Transport,
        folder: Path,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config
        self.task = task
        # Where replicas act as sites, the optimizer's way between them; ``everyone`` is between all replicas.
        self.transport = transport if config.sites is None else site_transport(transport, sites=config.sites)
        self.everyone = self.transport.everyone
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model: nn.Module = task.build_model(seed=config.seed).to(self.device)
        # Compiled, a module is still called as the module is.
        self._compute: Any = compiled(self.model, self.device) if config.compile else self.model
        name, options = recipes.parse_recipe(config.recipe)
        self.optimizer = recipes.build(name, self.model, lr=config.lr, transport=self.transport, **options)
        self.diagnostics = Diagnostics(
            self.model, self.optimizer, self.everyone, steps=config.steps, probes=config.probes
        )
        # Taken before the schedule moves the rates.
        self._described = str(self.optimizer)
        self._peak_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step = 0
        self.lengths: tuple[Length, ...] = (Length(steps=config.steps),)
        # Prints a line for the user beside the progress bar.
        self.say: Callable[[str], None] = print
        # Where this replica writes its host's events, if it does.
        self.events: Events | None = None
        # Where this replica writes for Prometheus, if it does.
        self.prometheus: PrometheusFile | None = None
        # What there is to say about how the run was resumed, a line each.
        self.notes: list[str] = []
        # The replicas that share the folder; found out when a checkpoint is saved first.
        self.together: Together | None = None
        self._totals = _Totals()
        self._recent_losses: list[float] = []
        self._compute_times: list[float] = []
        self._optimizer_times: list[float] = []
        torch.manual_seed(config.seed * 1000 + self.everyone.rank)
        if config.accumulate > 1:
            # A batch that has no such parts is refused before the first step.
            split_batch(task.batch(seed=config.seed, step=1, rank=0, world_size=1), config.accumulate)

    def request_stop(self) -> None:
        """Ask all replicas to stop together after one of the next steps, with a checkpoint."""
        self.transport.requested |= Flag.STOP

    def resume(self, *, new_length: bool = False) -> bool:
        """Continue from the newest checkpoint that all replicas have; False where none has any. All replicas call it together.

        Where there is no such checkpoint, replicas that have lost theirs get from another one what all share, and begin anew with
        what was their own: a residual is then zero. ``notes`` says so.

        Args:
            new_length: the run may have been started with another number of steps. Default: False.

        Raises:
            UsageError: a checkpoint belongs to another run, model or number of replicas, all are damaged, or the new length leaves
                nothing to train; on all replicas, and nothing has changed.
        """
        found = resume.find(self, free=(STEPS, LENGTHS) if new_length else ())
        if found is None:
            return False
        self.lengths, self.step = found.lengths, found.step
        state = found.state
        with torch.no_grad():
            for name, tensor in self.named_tensors():
                tensor.copy_(state["weights"][name])
        if found.lacks:
            sharing.load_shared(self.optimizer, state["optimizer"])
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"])
        self._totals = _Totals(**state["totals"])
        self._recent_losses = state["recent_losses"]
        self.diagnostics.load_state_dict(state.get("diagnostics"), step=found.step)
        self.notes = [*found.notes, *resume.losses(found, self.optimizer)]
        return True

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> RunResult:
        """Train to the last step, or until all replicas were asked to stop; write and return the result."""
        config, diverged = self.config, False
        eval_loss: float | None = None
        figures = SynchronizationFigures(self.transport)
        intervals = IntervalRecord(self.optimizer, self.folder, recipe=config.recipe, enabled=self.writes)
        began_s, waited_s = time.perf_counter(), self._totals.exchange_s
        with metrics_writer(
            self.folder,
            after_step=self.step,
            tensorboard=config.tensorboard,
            enabled=self.writes,
            transport=self.transport,
        ) as write:
            self._check_given()
            if self.step == 0:
                write(0, **asdict(self._totals), eval_loss=self._evaluate()[0])
            while self.step < config.steps and not self.stops:
                try:
                    loss, lr = self._one_step()
                except NonFiniteUpdateError:
                    diverged = True
                    write(self.step, **asdict(self._totals), train_loss=None)
                    break
                if self.events is not None:
                    self.events.stepped(self.step)
                figures.stepped()
                intervals.stepped(self.events, self.say)
                last = self.step >= config.steps
                eval_loss, train_loss = None, None
                on_time = self.step % config.evaluate_every == 0
                if last or on_time:
                    recent = self._recent_losses
                    eval_loss, train_loss = self._evaluate()
                    if not on_time:
                        # If the run is made longer, the next regular evaluation reports their mean.
                        self._recent_losses = recent
                    diverged = eval_loss is not None and not math.isfinite(eval_loss)
                write(
                    self.step,
                    lr=lr,
                    local_loss=loss,
                    **asdict(self._totals),
                    **({} if eval_loss is None else {"eval_loss": eval_loss, "train_loss": train_loss}),
                    **self.diagnostics.measure(),
                    **intervals.with_interval(figures.take(due=last or on_time)),
                )
                if self.prometheus is not None:
                    evaluated = {} if eval_loss is None else {"evaluation": eval_loss}
                    self.prometheus.write({"training": loss, **evaluated}, due=last or on_time)
                if on_progress is not None:
                    share = (self._totals.exchange_s - waited_s) / (time.perf_counter() - began_s)
                    on_progress(
                        Progress(
                            step=self.step,
                            steps=config.steps,
                            train_loss=loss,
                            eval_loss=eval_loss,
                            wait_share=share if self.data_slice[1] > 1 else None,
                        )
                    )
                if diverged:
                    break
                due = config.checkpoint_every and (last or self.step % config.checkpoint_every == 0)
                if due or (self.stops and not last):
                    self.save()
            if eval_loss is None and not diverged and self.complete:
                eval_loss, _ = self._evaluate()
        return self._result(diverged=diverged, eval_loss=eval_loss)

    @property
    def data_slice(self) -> tuple[int, int]:
        """Which slice of a step's batch is this replica's, and of how many."""
        return self.everyone.rank, self.everyone.world_size

    @property
    def writes(self) -> bool:
        """Whether this replica writes metrics and the result."""
        return self.everyone.rank == 0

    @property
    def stops(self) -> bool:
        """Whether the run is to end before its last step."""
        return Flag.STOP in self.transport.agreed

    @property
    def complete(self) -> bool:
        """Whether all steps are done, and the replicas have synchronized after the last."""
        return self.step >= self.config.steps

    def begin(self) -> None:
        """Meet the other replicas before the first step, where they are not there already."""

    def finish(self) -> None:
        """What is left to do for the other replicas after the last step; nothing where all are there."""

    def save(self) -> Path:
        """Write a checkpoint; all replicas call it in the same step.

        Raises:
            UsageError: a replica cannot write its part; on all of them.
        """
        if self.together is None:
            self.together = Together.find(self.folder, self.everyone)
        with self.optimizer.shared_weights():
            shared = {name: tensor.detach().clone() for name, tensor in self.named_tensors()}
        traffic = self.transport.meter.training
        optimizer = self.optimizer.state_dict()
        # What was in flight has arrived.
        self._totals.add(self.transport.meter.training - traffic, compute_s=0.0, optimizer_s=0.0)
        state = {
            "weights": dict(self.named_tensors()),
            "optimizer": optimizer,
            "random": random_state(),
            "totals": asdict(self._totals),
            "recent_losses": self._recent_losses,
            "diagnostics": self.diagnostics.state_dict(),
        }
        path = checkpoint.save(
            self.folder,
            step=self.step,
            identity=self.identity(),
            shared=shared,
            state=state,
            transport=self.everyone,
            together=self.together,
        )
        if self.events is not None:
            self.events.add("checkpoint", step=self.step)
        return path

    def settings(self) -> dict[str, Any]:
        """The identity of the run's settings, and its lengths where it has had several."""
        lengths = [asdict(length) for length in self.lengths]
        return {**self.config.identity(), **({LENGTHS: lengths} if len(lengths) > 1 else {})}

    def identity(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoints."""
        carried = {name for name, _ in self.named_tensors()}
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters() if name in carried}
        return {
            "config": self.settings(),
            "task": {"kind": self.config.task.name, **self.task.description},
            "shapes": shapes,
        }

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The model's parameters and buffers that checkpoints hold and replicas compare."""
        return self.task.carried(self.model)

    def _one_step(self) -> tuple[float, float]:
        config = self.config
        step = self.step + 1
        self.set_rates(step)
        traffic, inside_bytes = self.transport.meter.training, self.transport.inside_traffic.egress_bytes
        start_s = time.perf_counter()
        value, finite = self.gradient(step)
        if not finite:
            self.transport.requested |= Flag.DIVERGED
        computed_s = time.perf_counter()
        self.diagnostics.observe(step)
        observed_s = time.perf_counter()
        self.step = step = self._step_optimizer(step)
        self.optimizer.zero_grad()
        optimizer_s = time.perf_counter() - observed_s - (self.transport.meter.training - traffic).wait_s
        if config.digest_every and step % config.digest_every == 0:
            self._check_replicas()
        spent = self.transport.meter.training - traffic
        self._totals.inside_bytes += self.transport.inside_traffic.egress_bytes - inside_bytes
        self.count(spent, value=value, compute_s=computed_s - start_s, optimizer_s=optimizer_s)
        return value, self.optimizer.param_groups[0]["lr"]

    def set_rates(self, step: int) -> None:
        """Give the optimizer the learning rates of a step."""
        factor = self.config.lr_factor(step)
        for group, peak in zip(self.optimizer.param_groups, self._peak_lrs, strict=True):
            group["lr"] = peak * factor

    def gradient(self, step: int) -> tuple[float, bool]:
        """Compute the gradient of this replica's batch of a step into the parameters; its loss, and whether all is finite."""
        number, count = self.data_slice
        batch = self.task.batch(seed=self.config.seed, step=step, rank=number, world_size=count)
        value = accumulate(partial(self.task.loss, self._compute), batch, parts=self.config.accumulate)
        clip = self.config.clip
        norm = 0.0 if clip is None else float(clip_grad_norm_(self.model.parameters(), clip))
        # A gradient whose norm overflows would be shortened to nothing.
        return value, math.isfinite(value) and math.isfinite(norm)

    def count(self, traffic: Traffic, *, value: float, compute_s: float, optimizer_s: float) -> None:
        """Add what a step took, and its loss, to what is reported."""
        self._totals.add(traffic, compute_s=compute_s, optimizer_s=optimizer_s)
        self._compute_times.append(compute_s)
        self._optimizer_times.append(optimizer_s)
        self._recent_losses.append(value)

    def _step_optimizer(self, step: int) -> int:
        """One step of the optimizer; returns how many are done then."""
        self.optimizer.step()
        if step == self.config.steps:
            self.optimizer.synchronize()
        return step

    def _check_replicas(self) -> str:
        with self.optimizer.shared_weights():
            return check_replicas(self.named_tensors(), self.transport)

    def given(self) -> list[tuple[str, torch.Tensor]]:
        """What no checkpoint holds, such as the model below adapters, which every replica has from a place of its own."""
        carried = {name for name, _ in self.named_tensors()}
        return [entry for entry in self.model.named_parameters() if entry[0] not in carried]

    def _check_given(self) -> None:
        if given := self.given():
            check_replicas(given, self.everyone)

    def export(self, folder: Path) -> bool:
        """Write the shared weights as other programs open them, where the task can; all replicas call it, one writes."""
        with self.optimizer.shared_weights():
            return self.writes and self.task.export(self.model, folder)

    def _evaluate(self) -> tuple[float | None, float | None]:
        """Mean evaluation loss of the shared weights, and mean training loss since the last evaluation, over all replicas."""
        with self.optimizer.shared_weights():
            total, terms = self.task.evaluate(
                self.model, rank=self.everyone.rank, world_size=self.everyone.world_size
            )
        recent = sum(self._recent_losses), len(self._recent_losses)
        self._recent_losses = []
        gathered = self.everyone.gather(_EVALUATION.pack(total, terms, *recent), purpose="control")
        sums = [sum(column) for column in zip(*(_EVALUATION.unpack(g) for g in gathered), strict=True)]
        return sums[0] / sums[1], (sums[2] / sums[3] if sums[3] else None)

    def _result(self, *, diverged: bool, eval_loss: float | None) -> RunResult:
        finished = diverged or self.complete
        if self.events is not None:
            self.events.end("diverged" if diverged else "finished" if finished else "stopped")
        digest = "" if diverged else self._check_replicas()
        steps = max(self.step, 1)
        num_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        totals = self._totals
        result = RunResult(
            config=self.settings(),
            replicas=self.data_slice[1],
            steps=self.step,
            finished=finished,
            diverged=diverged,
            final_eval_loss=None if diverged or not finished else finite_or_none(eval_loss),
            num_parameters=num_parameters,
            bytes_sent_per_step=totals.sent_bytes / steps,
            bytes_egress_per_step=totals.egress_bytes / steps,
            bytes_received_per_step=totals.received_bytes / steps,
            messages_per_step=totals.num_messages / steps,
            bits_per_parameter_step=8 * totals.sent_bytes / steps / num_parameters,
            compute_s_per_step=_median(self._compute_times),
            optimizer_s_per_step=_mean_without_outliers(self._optimizer_times),
            exchange_s_per_step=totals.exchange_s / steps,
            weights_digest=digest,
            optimizer=self._described,
            diagnostics=self.diagnostics.means(),
            sites=self.config.sites,
            bytes_inside_per_step=totals.inside_bytes / steps,
        )
        if self.writes and finished:
            checkpoint.write_json(self.folder / RESULT, asdict(result))
        return result


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def _mean_without_outliers(values: list[float]) -> float:
    """Mean without the slowest hundredth: rare synchronizations count, a stall of the machine does not."""
    kept = sorted(values)[: max(len(values) - len(values) // 100, 1)]
    return sum(kept) / len(kept) if kept else 0.0
