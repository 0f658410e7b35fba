"""The adaptive polar factor without a host decision, for accelerators."""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.restarts import derive_restarts
from muonwire.polar.schedules import mixed
from muonwire.polar.spectrum import NUM_PROBES, probes

NUM_STEPS = 5
NUM_LANCZOS = 8
# The grid of l that the table of coefficients is made for: octaves from 1/2 to 1/1024.
LOWERS = tuple(2.0**-j for j in range(1, 11))
# ‖T³²‖_F^(1/32) is at most 8^(1/64) = 1.033 times λ_max(T); this covers what Lanczos has not found yet.
UPPER_MARGIN = 1.04
# The smallest Ritz value lies above the smallest eigenvalue.
LOWER_MARGIN = 0.5


@lru_cache(maxsize=8)
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    made = [mixed(lower=lower, degrees=(5,) * NUM_STEPS, safety=1.02).coefficients for lower in LOWERS]
    return torch.tensor(LOWERS, device=device), torch.tensor(made, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _restarts(roundoff: float) -> tuple[int, ...]:
    worst = mixed(lower=LOWERS[-1], degrees=(5,) * NUM_STEPS, safety=1.02)
    return derive_restarts(worst, np.geomspace(LOWERS[-1], 1, 64), roundoff=roundoff, spread=1.0).restarts


def extremes(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of λ_max from above and λ_min of each Gram matrix, by Lanczos, as tensors on its device.

    The eigenvalues of the small tridiagonal T come from powers of T and of its inverse, since an eigenvalue
    routine reads its status back to the host.

    Args:
        gram: (batch, r, r), float32.

    Returns:
        two (batch, 1, 1) tensors, the second at least 0.
    """
    batch, r, _ = gram.shape
    steps = min(NUM_LANCZOS, r)
    # Of each vector by itself: (batch, NUM_PROBES, steps, r).
    basis = [probes(r, gram.device).expand(batch, NUM_PROBES, r)]
    small = torch.zeros(batch, NUM_PROBES, steps, steps, device=gram.device)
    # A vector in an invariant subspace ends Lanczos early; what is left of T then repeats its first entry.
    alive = torch.ones(batch, NUM_PROBES, dtype=torch.bool, device=gram.device)
    for j in range(steps):
        w = (basis[j] @ gram.mT).unsqueeze(-1)
        known = torch.stack(basis, dim=-2)
        overlaps = known @ w
        w = (w - known.mT @ overlaps).squeeze(-1)
        small[..., j, j] = torch.where(alive, overlaps[..., j, 0], small[..., 0, 0])
        length = torch.linalg.vector_norm(w, dim=-1)
        alive = alive & (length > 1e-5 * small[..., 0, 0].abs())
        if j + 1 < steps:
            small[..., j, j + 1] = small[..., j + 1, j] = torch.where(alive, length, 0.0)
            basis.append(w / length.clamp(min=1e-30).unsqueeze(-1))
    size = torch.linalg.vector_norm(small, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    top = (small / size).matrix_power(32)
    largest = size * torch.linalg.vector_norm(top, dim=(-2, -1), keepdim=True) ** (1 / 32)
    shifted = small / size + 1e-6 * torch.eye(steps, device=gram.device)
    inverse = torch.linalg.inv_ex(shifted).inverse
    inverse_size = torch.linalg.vector_norm(inverse, dim=(-2, -1), keepdim=True).clamp(min=1e-30)
    bottom = torch.linalg.vector_norm(
        (inverse / inverse_size).matrix_power(8), dim=(-2, -1), keepdim=True
    ) ** (1 / 8)
    smallest = size / (inverse_size * bottom.clamp(min=1e-30))
    # What one vector has missed another has seen.
    return largest.amax(dim=1) * UPPER_MARGIN, smallest[:, 0]


def device_polar(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Polar factor of each matrix, five quintic iterations in the Gram form, no value read back by the host.

    The number of iterations and the restarts are fixed; the coefficients are gathered, on the device, from a
    table by the measured l = σ_min/σ_max, and the matrix is divided by the measured σ_max. A zero matrix
    gives zeros, a non-finite one NaN.

    Args:
        x: (..., m, n), floating, not empty.
        dtype: of the products.

    Returns:
        (..., m, n) in ``dtype``.

    >>> q = device_polar(torch.eye(3, 5), dtype=torch.float32)
    >>> torch.allclose(q, torch.eye(3, 5), atol=1e-3)
    True
    """
    y = x.reshape(-1, *x.shape[-2:])
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    wide = wide / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    y = (wide / torch.where(norm == 0, 1.0, norm)).to(dtype)
    upper, lower = extremes((y @ y.mT).float())
    y = (y.float() * torch.where(upper > 0, upper, 1.0).rsqrt()).to(dtype)
    ratio = LOWER_MARGIN * (lower / upper.clamp(min=1e-30)).sqrt().flatten()
    lowers, table = _table(x.device)
    # The grid descends; the first entry at or below the ratio is wanted, or the last one.
    index = (ratio.unsqueeze(-1) < lowers).sum(dim=-1).clamp(max=len(LOWERS) - 1)
    coefficients = table[index].to(dtype)
    eye = torch.eye(y.shape[-2], dtype=dtype, device=x.device)
    bounds = [0, *_restarts(torch.finfo(dtype).eps / 2), NUM_STEPS]
    for first, last in pairwise(bounds):
        gram = y @ y.mT
        total = eye
        for step in range(first, last):
            c0, c1, c2 = (coefficients[:, step, j, None, None] for j in range(3))
            weight = torch.baddbmm(c0 * eye + c1 * gram, c2 * gram, gram)
            total = weight if step == first else total @ weight
            if step + 1 < last:
                gram = gram @ weight @ weight
        y = total @ y
    y = y.mT if tall else y
    return y.reshape(x.shape)
