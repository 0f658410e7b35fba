"""What a few matrix-vector products say about the singular values: the largest, and where the rest lie."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.minimax import Values

# Lanczos steps. Eight resolve the edge of a flat spectrum to a few percent; two more cost 2 r² FLOPs each.
NUM_STEPS = 10
# The residual bounds how far the largest Ritz value can be from *some* eigenvalue. On spectra from flat to
# 1/k² the largest eigenvalue lies within this multiple of it.
UPPER_FRACTION = 1.5
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
def probe(size: int, device: torch.device) -> Tensor:
    """Unit vector of random signs, the same on every replica and in every process."""
    generator = torch.Generator("cpu").manual_seed(size)
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu").to(torch.float32) * 2 - 1
    unit: Tensor = signs / size**0.5
    return unit.to(device)


def measure_spectrum(gram: Tensor, *, start: Tensor | None = None) -> Spectrum:
    """Lanczos on the Gram matrix R = X Xᵀ from one random vector: NUM_STEPS products of R with a vector.

    The k Ritz values θ and the squares of their eigenvectors' first entries are the nodes and weights of the
    Gauss quadrature for the distribution of the eigenvalues that the vector sees. The residual ρ of a Ritz
    vector is the standard deviation of that vector's own distribution about θ, so each weight is spread
    evenly over the singular values of [θ − √3 ρ, θ + √3 ρ]: a cluster that Lanczos has found stays one, a
    continuum is filled.

    Args:
        gram: (r, r), any floating dtype; it is copied to float32.
        start: (r,) float32, of unit length. Default: the random vector; where that is orthogonal to the leading directions,
            as random signs are to those of a constant matrix, a vector that is not.

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
    steps = min(NUM_STEPS, r)
    basis = torch.empty(steps + 1, r, device=gram.device)
    basis[0] = probe(r, gram.device) if start is None else start
    tridiagonal = np.zeros((steps, steps))
    beta = 0.0
    for j in range(steps):
        w = torch.mv(full, basis[j])
        known = basis[: j + 1]
        overlaps = torch.mv(known, w)
        w = torch.addmv(w, known.mT, overlaps, alpha=-1)
        tridiagonal[j, j] = float(overlaps[j])
        beta = float(torch.linalg.vector_norm(w))
        if j + 1 == steps or beta <= 1e-6 * square_norm:
            steps = j + 1
            break
        tridiagonal[j, j + 1] = tridiagonal[j + 1, j] = beta
        torch.div(w, beta, out=basis[j + 1])
    ritz, vectors = np.linalg.eigh(tridiagonal[:steps, :steps])
    # A node stands for at least one singular value, however little of it the start happened to contain.
    weights = np.maximum(vectors[0] ** 2, 1 / r)
    weights /= weights.sum()
    residuals = beta * np.abs(vectors[-1])
    top = max(min(ritz[-1] + UPPER_FRACTION * residuals[-1], max(square_norm, ritz[-1])), 0.0)
    longest = int(row_norms.argmax())
    # The largest eigenvalue is at least as large as any row is long.
    if start is None and top < UNSEEN * float(row_norms[longest]):
        start = basis[0] + full[longest] / row_norms[longest]
        return measure_spectrum(gram, start=start / torch.linalg.vector_norm(start))
    width = np.sqrt(3) * residuals
    return Spectrum(
        upper=float(np.sqrt(max(top, 0.0))),
        frobenius=float(np.sqrt(max(trace, 0.0))),
        spread=float(row_norms.max()),
        low=np.sqrt(np.clip(ritz - width, 0.0, top)),
        high=np.sqrt(np.clip(ritz + width, 0.0, top)),
        weights=weights,
        smallest=float(np.sqrt(max(ritz[0], 0.0))),
    )
