"""Low rank over the replicas: one step of power iteration on the mean of their matrices, in two rounds."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.polar.orthonormal import householder
from muonwire.polar.power import initial_state
from muonwire.stages.base import Context, State, States, TalkingStage, Tensors
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request, Rounds

WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What one step gives for one tensor.

    Args:
        left: (..., m, rank), P with orthonormal columns, the same on all replicas.
        right: (..., n, rank), R = X̄ᵀ P, the same on all replicas.
        own: (..., n, rank), Xᵀ P of this replica's X.
    """

    left: Tensor
    right: Tensor
    own: Tensor


def power_rounds(
    xs: Sequence[Tensor], starts: Sequence[Tensor], *, wire: torch.dtype
) -> Generator[Request, Reply, list[Factors]]:
    """P = qr(mean of X Q), R = mean of Xᵀ P: the replicas exchange (m + n) · rank numbers for each matrix.

    Args:
        xs: (..., m, n) each, this replica's.
        starts: (..., n, rank) each, Q, the same on all replicas.
        wire: dtype on the wire.

    Source: Vogels et al., "PowerSGD", arXiv 1905.13727, algorithm 1.
    """
    reply = yield Request(tensors=[(x @ q).to(wire) for x, q in zip(xs, starts, strict=True)])
    lefts = []
    for x, product in zip(xs, reply.tensors, strict=True):
        wide = product.to(x.dtype)
        # A zero matrix has no range; its Q factor would be arbitrary.
        size = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
        lefts.append(torch.where(size > 0, householder(wide), 0.0))
    owns = [x.mT @ p for x, p in zip(xs, lefts, strict=True)]
    reply = yield Request(tensors=[own.to(wire) for own in owns])
    return [
        Factors(left=p, right=r.to(p.dtype), own=own)
        for p, r, own in zip(lefts, reply.tensors, owns, strict=True)
    ]


def unit_columns(right: Tensor, *, otherwise: Tensor | float) -> Tensor:
    """R with columns of unit length; a column of zeros, which the matrices do not reach, becomes ``otherwise``'s."""
    length = torch.linalg.vector_norm(right, dim=-2, keepdim=True)
    return torch.where(length > 0, right / torch.where(length > 0, length, 1.0), otherwise)


def _beside(starts: Sequence[Tensor]) -> Tensor:
    """(..., n, rank) each, side by side."""
    # Concatenating a single tensor would change its memory order, and with it the rounding of products.
    return starts[0] if len(starts) == 1 else torch.cat(list(starts), dim=-1)


@dataclass(frozen=True, kw_only=True)
class _Power(TalkingStage):
    """What the low-rank stages share: a rank for every matrix, a warm start, a dtype on the wire.

    Args:
        rank: at most; the smaller dimension of a matrix limits it. Default: 4.
        fraction: rank as a share of the smaller dimension, instead of ``rank``. Default: none.
        wire: "float32" or "bfloat16". Default: "float32".
    """

    rank: int = 4
    fraction: float | None = None
    wire: str = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.fraction is not None and not 0 < self.fraction <= 1):
            raise UsageError(
                f"{self.name}: rank is {self.rank} and fraction {self.fraction}; a rank of at least 1, or a fraction in "
                "(0, 1], is wanted"
            )
        if self.wire not in WIRES:
            raise UsageError(f"{self.name}: wire is {self.wire!r}; allowed are {', '.join(WIRES)}")

    def rank_of(self, shape: Sequence[int]) -> int:
        """Rank for a matrix of ``shape``."""
        smaller = min(shape[-2:])
        wanted = self.rank if self.fraction is None else round(self.fraction * smaller)
        return max(1, min(wanted, smaller))

    @property
    @override
    def replaces_states(self) -> bool:
        return True

    @override
    def init(self, param: Tensor) -> State:
        """What the replica keeps of its matrices, zero; ``prepare`` adds the start Q."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        return {"kept": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)}

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        """The start of the power iteration, Q of all matrices side by side."""
        empty = torch.empty((), dtype=param.dtype, device=param.device)
        state["start"] = self._start([empty.expand(s) for s in layout.shapes(tuple(param.shape))])

    def _start(self, parts: Sequence[Tensor]) -> Tensor:
        """Q of matrices of these shapes."""
        # In the memory order of later starts: distributed checkpoints load these into the place of this one.
        return _beside([initial_state(x, rank=self.rank_of(x.shape)) for x in parts]).contiguous()

    @property
    @override
    def multiplies(self) -> bool:
        return True

    @property
    @override
    def reads_params(self) -> bool:
        return False

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """The start of the power iteration; what is kept of the matrices is the replica's own."""
        return state if alike else {key: state[key] for key in ("start",) if key in state}

    @override
    def estimate_bytes(self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int) -> float:
        """Two factors of each matrix, (m + n) · rank numbers."""
        shapes = [s for p, layout in zip(params, layouts, strict=True) for s in layout.shapes(tuple(p.shape))]
        numbers = [math.prod(s[:-2]) * (s[-2] + s[-1]) * self.rank_of(s) for s in shapes]
        return float(sum(numbers) * WIRES[self.wire].itemsize)

    def iterate(
        self, xs: Sequence[Sequence[Tensor]], states: Sequence[State]
    ) -> Generator[Request, Reply, list[list[Factors]]]:
        """The factors of each parameter's matrices, which also become the start of its next step.

        Args:
            xs: the matrices of each parameter, as its layout splits it.
            states: of the parameters; "start" holds Q of all its matrices, side by side.
        """
        starts = []
        for parts, state in zip(xs, states, strict=True):
            ranks = [self.rank_of(x.shape) for x in parts]
            if "start" not in state:
                state["start"] = self._start(parts)
            starts.append(state["start"].split(ranks, dim=-1))
        flat = yield from power_rounds(
            [x for parts in xs for x in parts], [q for qs in starts for q in qs], wire=WIRES[self.wire]
        )
        made = iter(flat)
        factors = [[next(made) for _ in parts] for parts in xs]
        for state, before, after in zip(states, starts, factors, strict=True):
            # A column that the matrices did not reach keeps its last start.
            next_start = [unit_columns(f.right, otherwise=q) for f, q in zip(after, before, strict=True)]
            state["start"] = _beside(next_start)
        return factors


@dataclass(frozen=True, kw_only=True)
class PowerSGD(_Power):
    """X = u + decay · e; P, R by one warm-started power iteration on the mean X̄; u ← P Rᵀ; e ← X − P Pᵀ X.

    Args:
        decay: of the residual e, in [0, 1]; 0 keeps nothing. Default: 1.

    Source: Vogels et al., "PowerSGD", arXiv 1905.13727, algorithms 1 and 2.
    """

    decay: float = 1.0

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        wholes = [s["kept"].mul(self.decay).add_(u) for u, s in zip(updates, states, strict=True)]
        xs = [layout.split(whole) for whole, layout in zip(wholes, context.layouts, strict=True)]
        factors = yield from self.iterate(xs, states)
        results = []
        for whole, parts, fs, state, layout in zip(wholes, xs, factors, states, context.layouts, strict=True):
            shape = tuple(whole.shape)
            left_out = [x - f.left @ f.own.mT for x, f in zip(parts, fs, strict=True)]
            state["kept"] = layout.join(left_out, shape)
            if context.watch is not None:
                context.watch(whole, state["kept"])
            results.append(layout.join([f.left @ f.right.mT for f in fs], shape))
        return results


@dataclass(frozen=True, kw_only=True)
class Dion(_Power):
    """B = M + u; P, R by one warm-started power iteration on B̄; M ← B − (1 − μ) P Pᵀ B; returns P · R̂ᵀ, R̂ = R with unit columns.

    The momentum M is the replica's own and doubles as the error feedback; P R̂ᵀ is nearly the polar factor of the leading part
    of B̄. The paper subtracts P Rᵀ with the shared R; the replica's own Pᵀ B has the same mean and leaves less behind.

    Args:
        momentum: μ, in [0, 1). Default: 0.95.

    Source: Ahn et al., "Dion: distributed orthonormalized updates", arXiv 2504.05295, algorithms 1 and 2.
    """

    momentum: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise UsageError(f"dion: momentum is {self.momentum}; it must lie in [0, 1)")

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        wholes = [s["kept"] + u for u, s in zip(updates, states, strict=True)]
        xs = [layout.split(whole) for whole, layout in zip(wholes, context.layouts, strict=True)]
        factors = yield from self.iterate(xs, states)
        results = []
        for whole, parts, fs, state, layout in zip(wholes, xs, factors, states, context.layouts, strict=True):
            shape = tuple(whole.shape)
            caught = [f.left @ f.own.mT for f in fs]
            kept = [x - (1 - self.momentum) * c for x, c in zip(parts, caught, strict=True)]
            state["kept"] = layout.join(kept, shape)
            if context.watch is not None:
                # Most of M is kept as momentum; what the factors leave out is what was not sent.
                for x, c in zip(parts, caught, strict=True):
                    context.watch(x, x - c)
            steps = [f.left @ unit_columns(f.right, otherwise=0.0).mT for f in fs]
            results.append(layout.join(steps, shape))
        return results
