"""What a few matrix-vector products say about the singular values: the largest, and where the rest lie."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.minimax import Values

# Lanczos steps. Eight resolve the edge of a flat spectrum to a few percent; two more cost 2 r² FLOPs each.
NUM_STEPS = 10
# The residual bounds how far the largest Ritz value can be from *some* eigenvalue. On spectra from flat to
# 1/k² the largest eigenvalue lies within this multiple of it.
UPPER_FRACTION = 1.5
# Vectors to start from. One in some thousands has next to nothing of the leading direction in it, and its Lanczos steps converge
# to the second largest eigenvalue with a small residual. Polynomials grow without bound above what they are made for: 6 % above,
# three quintics make 10¹⁰ of it. All of several vectors miss a direction in none of 10¹⁰.
NUM_PROBES = 4
# An estimate of the largest eigenvalue under this fraction of what it is at least has missed its direction.
UNSEEN = 0.5


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Estimate of the distribution of the singular values of one matrix.

    Args:
        upper: estimate of σ_max from above.
        frobenius: ‖X‖_F.
        low: left end of each node's cell, ascending nodes, in singular values.
        high: right end of each node's cell.
        weights: fraction of the singular values in each cell.
        smallest: the smallest node.
        spread: largest norm of a row of the Gram matrix: what rounding its entries can move its eigenvalues by, over u.
            Where all rows weigh alike it is ‖R‖_F/√r, the root mean square of the eigenvalues.
    """

    upper: float
    frobenius: float
    spread: float
    low: Values
    high: Values
    weights: Values
    smallest: float

    def scaled(self, factor: float) -> "Spectrum":
        """That of ``factor`` times the matrix."""
        return replace(
            self,
            upper=self.upper * factor,
            frobenius=self.frobenius * factor,
            spread=self.spread * factor**2,
            low=self.low * factor,
            high=self.high * factor,
            smallest=self.smallest * factor,
        )

    def fraction_below(self, edges: Values) -> Values:
        """Fraction of the singular values below each of ``edges``, which are relative to ``upper``."""
        at = (edges * self.upper)[:, None]
        inside = (at - self.low) / np.maximum(self.high - self.low, 1e-12 * self.upper)
        return np.clip(inside, 0.0, 1.0) @ self.weights

    def mass(self, edges: Values) -> Values:
        """Fraction of the singular values between consecutive ``edges``, which are relative to ``upper``."""
        return np.diff(self.fraction_below(edges))


@lru_cache(maxsize=64)
def probes(size: int, device: torch.device) -> Tensor:
    """(NUM_PROBES, size): unit vectors of random signs, the same on every replica and in every process."""
    generator = torch.Generator("cpu").manual_seed(size)
    signs = (
        torch.randint(0, 2, (NUM_PROBES, size), generator=generator, device="cpu").to(torch.float32) * 2 - 1
    )
    units: Tensor = signs / size**0.5
    return units.to(device)


class Ritz(NamedTuple):
    """Of one start: ascending Ritz values, the eigenvectors of the tridiagonal matrix, and each Ritz vector's residual."""

    values: Values
    vectors: Values
    residuals: Values

    @property
    def above(self) -> float:
        """The largest eigenvalue that the start has seen, from above."""
        return float(self.values[-1] + UPPER_FRACTION * self.residuals[-1])


def ritz_values(diagonal: Values, beside: Values, *, negligible: float) -> Ritz:
    """Of the tridiagonal matrix of one start, up to where its steps ended."""
    ended = np.flatnonzero(beside <= negligible)
    steps = int(ended[0]) + 1 if len(ended) else len(diagonal)
    values, vectors = np.linalg.eigh(_tridiagonal(diagonal[:steps], beside[:steps]))
    return Ritz(values, vectors, beside[steps - 1] * np.abs(vectors[-1]))


def _tridiagonal(diagonal: Values, beside: Values) -> Values:
    made = np.diag(diagonal)
    at = np.arange(len(diagonal) - 1)
    made[at, at + 1] = made[at + 1, at] = beside[:-1]
    return made


def lanczos(matrix: Tensor, starts: Tensor, *, negligible: float) -> tuple[Values, Values]:
    """Lanczos for each start by itself: at most NUM_STEPS products with all of them.

    The first one's vectors are kept orthogonal to all before them, so that its weights are right. The others', of which only the
    largest value is wanted, follow the recurrence of three terms alone.

    Args:
        matrix: (r, r) float32, symmetric.
        starts: (p, r), of unit length.
        negligible: a residual of this length ends a start's steps.

    Returns:
        (p, steps) each: the diagonals of the tridiagonal matrices, and what lies beside them, with the last residual behind.
    """
    count, r = starts.shape
    steps = min(NUM_STEPS, r)
    first = torch.empty(steps, r, device=matrix.device)
    diagonal = torch.empty(steps, count, device=matrix.device)
    beside = torch.empty(steps, count, device=matrix.device)
    newest, before = starts.contiguous(), None
    for j in range(steps):
        first[j] = newest[0]
        w = newest @ matrix
        diagonal[j] = torch.linalg.vecdot(w, newest)
        w.addcmul_(diagonal[j, :, None], newest, value=-1)
        if before is not None:
            w.addcmul_(beside[j - 1, :, None], before, value=-1)
        known = first[: j + 1]
        w[0].addmv_(known.mT, known @ w[0], alpha=-1)
        torch.linalg.vector_norm(w, dim=1, out=beside[j])
        # A start whose steps have ended goes on with next to nothing.
        before, newest = newest, w.div_(beside[j, :, None].clamp(min=negligible))
    made = torch.stack([diagonal, beside]).to(device="cpu", dtype=torch.float64).numpy()
    return made[0].T, made[1].T


def measure_spectrum(gram: Tensor, *, start: Tensor | None = None) -> Spectrum:
    """Lanczos on the Gram matrix R = X Xᵀ from NUM_PROBES random vectors: NUM_STEPS products of R with all of them.

    The first one's is the estimate of the distribution; the largest eigenvalue is that which any of them has seen.

    The k Ritz values θ and the squares of their eigenvectors' first entries are the nodes and weights of the
    Gauss quadrature for the distribution of the eigenvalues that the vector sees. The residual ρ of a Ritz
    vector is the standard deviation of that vector's own distribution about θ, so each weight is spread
    evenly over the singular values of [θ − √3 ρ, θ + √3 ρ]: a cluster that Lanczos has found stays one, a
    continuum is filled.

    Args:
        gram: (r, r), any floating dtype; it is copied to float32.
        start: (r,) float32, of unit length, in place of the first vector. Default: random signs; where all that they see is
            shorter than the longest row, as with a constant matrix, a vector that has a part of that row.

    Returns:
        the estimate; ``upper`` is at most ‖R‖_F^½ and above σ_max in all but contrived cases.

    >>> spectrum = measure_spectrum(torch.diag(torch.tensor([4.0, 1.0, 1.0, 1.0])))
    >>> round(spectrum.upper, 3), round(spectrum.frobenius, 3)
    (2.0, 2.646)

    Source: Golub and Meurant, "Matrices, Moments and Quadrature" (2010), chapter 6.
    """
    r = gram.shape[0]
    full = gram.to(torch.float32)
    trace = float(full.diagonal().sum())
    row_norms = torch.linalg.vector_norm(full, dim=1)
    square_norm = float(torch.linalg.vector_norm(row_norms))
    starts = probes(r, gram.device)
    if start is not None:
        starts = torch.cat([start[None], starts[1:]])
    negligible = 1e-6 * square_norm + 1e-30
    diagonals, beside = lanczos(full, starts, negligible=negligible)
    first = ritz_values(diagonals[0], beside[0], negligible=negligible)
    ritz = first.values
    # A node stands for at least one singular value, however little of it the start happened to contain.
    weights = np.maximum(first.vectors[0] ** 2, 1 / r)
    weights /= weights.sum()
    top = max(min(first.above, max(square_norm, float(ritz[-1]))), 0.0)
    longest = int(row_norms.argmax())
    # The largest eigenvalue is at least as large as any row is long.
    if start is None and top < UNSEEN * float(row_norms[longest]):
        start = starts[0] + full[longest] / row_norms[longest]
        return measure_spectrum(gram, start=start / torch.linalg.vector_norm(start))
    # Ritz values are never above the largest eigenvalue: one above ``top`` is of a direction that the first start has missed.
    others = np.array([_tridiagonal(d, b) for d, b in zip(diagonals[1:], beside[1:], strict=True)])
    if np.linalg.eigvalsh(others).max() > top:
        for diagonal, off in zip(diagonals[1:], beside[1:], strict=True):
            other = ritz_values(diagonal, off, negligible=negligible)
            if other.values[-1] > top:
                top = max(min(other.above, square_norm), float(other.values[-1]))
    width = np.sqrt(3) * first.residuals
    return Spectrum(
        upper=float(np.sqrt(max(top, 0.0))),
        frobenius=float(np.sqrt(max(trace, 0.0))),
        spread=float(row_norms.max()),
        low=np.sqrt(np.clip(ritz - width, 0.0, top)),
        high=np.sqrt(np.clip(ritz + width, 0.0, top)),
        weights=weights,
        smallest=float(np.sqrt(max(ritz[0], 0.0))),
    )
