"""Measurements within a run that help to explain its loss; they never change what is trained."""

import math
import struct
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer
from muonwire.optim.routing import Route, route
from muonwire.polar import polar
from muonwire.train.metrics import finite_or_none
from muonwire.transport import Transport

# Replicas of equal data stay below √(R − 1), at which their changes have nothing in common; beyond this multiple of it they oppose
# each other, and not by chance.
APART = 1.05
MEASURES = ("alignment", "effective_rank", "disagreement", "kept_over_sent")
MOMENTUM = 0.95
# Sums over this replica's share of the matrices and over its own tensors: cosines and their number, ranks and theirs, squares of
# departure, kept and sent.
_SUMS = struct.Struct("<7d")


@dataclass(kw_only=True)
class _Probe:
    """What one probe captures around an exchange; ``change`` is complete only after it.

    Args:
        momenta: this replica's momentum of each hidden parameter.
        held: what it brings to the exchange; the momentum, or the weight change of local steps.
        before: the shared weights before.
        change: what the shared weights moved by.
        kept, sent: squares of what the feedback kept and gave away, summed.
    """

    momenta: list[Tensor]
    held: list[Tensor]
    before: list[Tensor]
    change: list[Tensor] = field(default_factory=list)
    kept: float = 0.0
    sent: float = 0.0


class Diagnostics:
    """Probes a run at a few of its synchronizations; all replicas get the same figures, over control messages.

    Let mᵣ be replica r's momentum as dense Muon has it: v ← β v + (1 − β) g, m = β v + (1 − β) g with β = 0.95, m̄ the mean over the
    replicas, and the hidden matrices those that routing finds. A probe measures:

    - ``alignment``: cosine between the change of the shared weights and −polar(m̄), mean over the hidden matrices. The change is
      that of the last step, or with local steps that of the last synchronization.
    - ``effective_rank``: exp(entropy of the normalized singular values) / min(m, n) of the same change, mean over the matrices.
    - ``disagreement``: √(mean over r of ‖sᵣ − s̄‖²) / ‖s̄‖ of what the replicas hold before the exchange, all hidden matrices as one
      vector: the weight change with local steps, else the momentum.
    - ``kept_over_sent``: ‖what the feedback keeps‖ / ‖what was sent‖ of all tensors that pass a stage with feedback, of all
      replicas.

    Changes of local steps whose disagreement is above 1.05 √(R − 1) point apart; the first replica warns of it once.

    What does not apply is None: without hidden matrices the first three, without feedback the last.

    Args:
        model: in training.
        optimizer: of the model, as a recipe makes it.
        transport: between the replicas.
        steps: of the run.
        probes: about how many, at equal distances, the last at the end; each waits for the next synchronization. 0: none, and
            nothing is kept or computed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: ChainOptimizer,
        transport: Transport,
        *,
        steps: int,
        probes: int,
    ) -> None:
        self._transport = transport
        self._optimizer = optimizer
        self._targets = [-(-steps * i // probes) for i in range(1, probes + 1)]
        self._routes = _hidden(model) if probes else []
        self._averages = [torch.zeros_like(r.param, dtype=torch.float32) for r in self._routes]
        self._step = self._last = 0
        self._probe: _Probe | None = None
        self._measured: list[dict[str, float | None]] = []
        # One of the replicas tells for all.
        self._told = transport.rank != 0
        if probes:
            optimizer.before_exchange = self._before
            optimizer.after_exchange = self._after

    @torch.no_grad()
    def observe(self, step: int) -> None:
        """Take in the gradients of ``step``, before the optimizer does."""
        self._step = step
        for r, average in zip(self._routes, self._averages, strict=True):
            average.lerp_(_gradient(r.param), 1 - MOMENTUM)

    @torch.no_grad()
    def _before(self) -> None:
        if not any(self._last < target <= self._step for target in self._targets):
            return
        momenta = [
            _gradient(r.param).lerp(v, MOMENTUM) for r, v in zip(self._routes, self._averages, strict=True)
        ]
        shared = self._shared()
        held = (
            [(s - r.param).float() for s, r in zip(shared, self._routes, strict=True)]
            if self._optimizer.local
            else momenta
        )
        self._probe = _Probe(momenta=momenta, held=held, before=[w.detach().clone() for w in shared])
        self._optimizer.watch = self._watch

    @torch.no_grad()
    def _after(self) -> None:
        if self._probe is not None:
            self._probe.change = [
                (w - b).float() for w, b in zip(self._shared(), self._probe.before, strict=True)
            ]
            self._last = self._step
            self._optimizer.watch = None

    def _watch(self, whole: Tensor, kept: Tensor) -> None:
        assert self._probe is not None
        self._probe.kept += _square(kept)
        self._probe.sent += _square(whole - kept)

    def _shared(self) -> list[Tensor]:
        return [self._optimizer.shared_weight(r.param) for r in self._routes]

    @torch.no_grad()
    def measure(self) -> dict[str, float | None]:
        """The figures of this step, the same on all replicas, which call it together; empty where it was not probed."""
        probe, self._probe = self._probe, None
        if probe is None:
            return {}
        separate = [] if probe.held is probe.momenta else probe.held
        means = self._transport.mean([*probe.momenta, *separate], purpose="control")
        momenta, held = means[: len(probe.momenta)], means[len(separate) :]
        cosines, ranks = [], []
        for i, (r, momentum, change) in enumerate(zip(self._routes, momenta, probe.change, strict=True)):
            # Singular values are the costly part; the replicas share the work.
            if i % self._transport.world_size == self._transport.rank:
                for moved, pushed in zip(r.layout.split(change), r.layout.split(momentum), strict=True):
                    cosines += _alignments(moved, pushed)
                    ranks += _effective_ranks(moved)
        departure = sum(_square(own - mean) for own, mean in zip(probe.held, held, strict=True))
        own = (sum(cosines), len(cosines), sum(ranks), len(ranks), departure, probe.kept, probe.sent)
        gathered = self._transport.gather(_SUMS.pack(*own), purpose="control")
        sums = [sum(column) for column in zip(*(_SUMS.unpack(g) for g in gathered), strict=True)]
        common = sum(_square(mean) for mean in held)
        figures = {
            "alignment": _ratio(sums[0], sums[1]),
            "effective_rank": _ratio(sums[2], sums[3]),
            "disagreement": _root(_ratio(sums[4] / len(gathered), common)),
            "kept_over_sent": _root(_ratio(sums[5], sums[6])),
        }
        self._measured.append(figures)
        self._warn_of_unlike_data(figures["disagreement"])
        return figures

    def _warn_of_unlike_data(self, disagreement: float | None) -> None:
        """Once, where replicas' changes of local steps point apart: nothing that is exchanged later makes that good."""
        replicas = self._transport.world_size
        if self._told or replicas < 2 or not self._optimizer.local or disagreement is None:
            return
        alone = math.sqrt(replicas - 1)
        if disagreement > APART * alone:
            self._told = True
            warnings.warn(
                f"step {self._step}: the replicas' changes point apart (disagreement {disagreement:.2f}; those that have nothing "
                f"in common have √(R − 1) = {alone:.2f} at {replicas} replicas), as where each has another language. Updates of "
                "their own lose much there: give all of them mixed data, or exchange gradients (muon)",
                stacklevel=3,
            )

    def means(self) -> dict[str, float | None]:
        """Means over the probes so far, by measure; empty where there was none."""
        if not self._measured:
            return {}
        found = {name: [v for m in self._measured if (v := m[name]) is not None] for name in MEASURES}
        return {name: _ratio(sum(values), len(values)) for name, values in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """The averages and the figures so far, so that a resumed run measures what an undisturbed one does."""
        return {"averages": self._averages, "measured": self._measured, "last": self._last}

    def load_state_dict(self, state: dict[str, Any] | None, *, step: int) -> None:
        """Load what ``state_dict`` gave; with None, or from a run without probes, begin at ``step`` with empty averages."""
        self._step = self._last = step
        if state is not None and len(state["averages"]) == len(self._averages):
            for average, saved in zip(self._averages, state["averages"], strict=True):
                average.copy_(saved)
            self._measured, self._last = state["measured"], state["last"]


def _hidden(model: nn.Module) -> list[Route]:
    try:
        return route(model).polar
    except UsageError:
        # A model that no recipe with Muon takes can still be trained by others.
        return []


def _gradient(param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=torch.float32) if param.grad is None else param.grad.float()


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.float())) ** 2


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _alignments(change: Tensor, momentum: Tensor) -> list[float]:
    """Cosine of each matrix of ``change`` with minus the polar factor of ``momentum``'s; those that are zero are left out."""
    if not (_finite(change) and _finite(momentum)):
        return []
    direction = polar(momentum, method="svd")
    inner = -(change * direction).sum(dim=(-2, -1))
    sizes = torch.linalg.matrix_norm(change) * torch.linalg.matrix_norm(direction)
    return [float(i / s) for i, s in zip(inner.flatten(), sizes.flatten(), strict=True) if s > 0]


def _effective_ranks(change: Tensor) -> list[float]:
    """exp(entropy) of each matrix's normalized singular values over their number; zero matrices are left out."""
    if not _finite(change):
        return []
    values = torch.linalg.svdvals(change)
    values = values.reshape(-1, values.shape[-1])
    shares = [v / v.sum() for v in values if v.sum() > 0]
    return [float(torch.exp(torch.special.entr(p).sum())) / len(p) for p in shares]


def _ratio(over: float, under: float) -> float | None:
    return finite_or_none(over / under) if under else None


def _root(value: float | None) -> float | None:
    return None if value is None else value**0.5
