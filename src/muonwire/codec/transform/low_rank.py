"""Low rank: the two factors of a matrix in place of the matrix."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import random
from muonwire.codec.host import on_host, send
from muonwire.codec.part import Round, Shape, State
from muonwire.codec.transform.base import Transform, matrix_shape
from muonwire.errors import UsageError

METHODS = ("power", "rsvd", "svd")
# Columns of the randomized sketch beyond the rank (Halko et al., section 1.3, advise 5 to 10).
_OVERSAMPLING = 8
# Entries of the product that are made at a time, so that they stay in the second-level cache.
_CACHED_NUMEL = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LowRank(Transform):
    """X ≈ P Qᵀ with P (m, r) and Q (n, r): a block is a column of P and the column of Q that belongs to it, m + n numbers.

    Each pair is balanced: its two halves have the same root mean square, so that they share a quantizer's scale well.
    Vectors, and matrices that would not get smaller (r (m + n) ≥ m n), go as rows, untransformed. Not linear: the mean of
    products is not the product of means, so that replicas' matrices are averaged after decoding.

    The product is summed column by column with elementwise operations, each correctly rounded, so that it is the same on
    every machine, which a matrix product is not. Only the sender computes factorizations.

    Args:
        rank: r; at most min(m, n) of it is used. Default: 4.
        method: how the factors are found. "power": P = qr(X Q), Q = Xᵀ P, from the Q that the sender keeps of the last
            round, 4 m n r FLOPs; a cold start is random. "rsvd": the randomized SVD. "svd": the truncated SVD, the
            nearest matrix of the rank. Default: "power".
        iterations: "power": (P, Q) steps a round, at least 1; "rsvd": power iterations, at least 0. "svd" has no use for
            it. Default: 1.

    Source: Vogels et al., "PowerSGD", arXiv 1905.13727, algorithm 1; Halko, Martinsson and Tropp, "Finding structure with
    randomness", arXiv 0909.4061, algorithms 4.4 and 5.1; Eckart and Young (1936).

    >>> x = torch.outer(torch.arange(1.0, 5.0), torch.ones(5))
    >>> codec = LowRank(rank=1)
    >>> blocks = codec.forward(x, Round())
    >>> blocks.shape, torch.allclose(codec.inverse(blocks, (4, 5), seed=0), x)
    (torch.Size([1, 9]), True)
    """

    name: ClassVar[str] = "lowrank"
    linear: ClassVar[bool] = False
    rank: int = 4
    method: str = "power"
    iterations: int = 1

    def __post_init__(self) -> None:
        self.check_count("rank")
        self.check_choice("method", METHODS)
        fewest = 1 if self.method == "power" else 0
        if not isinstance(self.iterations, int) or self.iterations < fewest:
            raise UsageError(
                f"lowrank: iterations is {self.iterations}; method {self.method} takes an integer of at least {fewest}"
            )

    def _rank(self, shape: Shape) -> int:
        """The rank that is used; 0 where the matrix goes as rows."""
        m, n = matrix_shape(shape)
        rank = min(self.rank, m, n)
        return rank if rank * (m + n) < m * n else 0

    @override
    def grid(self, shape: Shape) -> tuple[int, int]:
        rank = self._rank(shape)
        m, n = matrix_shape(shape)
        return (rank, m + n) if rank else (m, n)

    @override
    def init(self, shape: Shape) -> State:
        """The start of the power iteration: ``q`` (n, rank) in float32, the same on all replicas."""
        rank = self._rank(shape)
        return {"q": _start(matrix_shape(shape)[1], rank, seed=0)} if rank and self.method == "power" else {}

    @override
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        """With method "power" it replaces ``now.state["q"]``."""
        rank = self._rank(tuple(tensor.shape))
        x = tensor.reshape(matrix_shape(tuple(tensor.shape)))
        if not rank:
            return x
        # In units of the largest magnitude no square overflows or vanishes.
        unit = x.abs().max()
        if on_host(x.device) and unit == 0:
            return x.new_zeros(rank, sum(x.shape))
        # An accelerator is not asked whether it is: factors of zeros times zero are zeros, too.
        x = x / torch.where(unit > 0, unit, 1)
        if self.method == "svd":
            left, values, right = torch.linalg.svd(x, full_matrices=False)
            p, q = left[:, :rank], right[:rank].mT * values[:rank]
        elif self.method == "rsvd":
            p, q = self._randomized(x, rank, now.seed)
        else:
            kept = now.state.get("q")
            p, q = self._power(x, _start(x.shape[1], rank, seed=now.seed) if kept is None else kept)
            if kept is not None:
                kept.copy_(_directions(q, kept))
        return _balance(p, q, unit)

    @override
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        if not self._rank(shape):
            return blocks.reshape(shape)
        m, n = matrix_shape(shape)
        product = torch.empty(m, n, dtype=blocks.dtype, device=blocks.device)
        at_once = max(_CACHED_NUMEL // n, 1) if on_host(blocks.device) else m
        term = torch.empty_like(product[:at_once])
        for start in range(0, m, len(term)):
            rows = product[start : start + len(term)]
            rows.zero_()
            for column in blocks:
                # One product and one sum: a fused multiply-add (torch.addcmul) rounds once and not everywhere.
                rows += torch.mul(column[start : start + len(rows), None], column[m:], out=term[: len(rows)])
        return product.reshape(shape)

    def _power(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        q = send(start.to(x.dtype), x.device)
        for _ in range(self.iterations):
            p = torch.linalg.qr(x @ q).Q
            q = x.mT @ p
        return p, q

    def _randomized(self, x: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
        sketch = send(
            _start(x.shape[1], min(rank + _OVERSAMPLING, *x.shape), seed=seed).to(x.dtype), x.device
        )
        basis = torch.linalg.qr(x @ sketch).Q
        for _ in range(self.iterations):
            basis = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ basis).Q).Q
        left, values, right = torch.linalg.svd(basis.mT @ x, full_matrices=False)
        return basis @ left[:, :rank], right[:rank].mT * values[:rank]


def _start(n: int, rank: int, *, seed: int) -> Tensor:
    """(n, rank) orthonormal columns that span a random subspace."""
    entries = random.uniform(seed, "lowrank", n * rank).view(n, rank) - 0.5
    basis: Tensor = torch.linalg.qr(entries).Q
    return basis.to(torch.float32)


def _directions(q: Tensor, before: Tensor) -> Tensor:
    """Columns of q with unit length; where the matrix gave none, the direction before, so that the rank never falls."""
    length = torch.linalg.vector_norm(q, dim=0)
    some = length > 0
    directions: Tensor = torch.where(some, q / torch.where(some, length, 1), before.to(q))
    return directions


def _balance(p: Tensor, q: Tensor, unit: Tensor) -> Tensor:
    """Blocks (rank, m + n) of unit · P Qᵀ, P of unit columns: p s beside q unit / s, with s such that both have the same rms."""
    m, n = len(p), len(q)
    length = torch.linalg.vector_norm(q, dim=0)
    # A root of each factor, so that nothing overflows or vanishes for the largest and smallest units.
    left_length = (math.sqrt(m / n) * length).sqrt() * unit.sqrt()
    direction = q / torch.where(length > 0, length, 1)
    return torch.cat((p * left_length, direction * (math.sqrt(n / m) * left_length))).mT.contiguous()
