"""The Newton-Schulz family with a given schedule: matrix products only, scaled by the Frobenius norm."""

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.gram import gram_iteration
from muonwire.polar.minimax import evaluate
from muonwire.polar.restarts import derive_restarts
from muonwire.polar.schedule import Schedule

# Below this Frobenius norm torch.optim.Muon divides by this instead; the matrix is rescaled first to keep
# clear of it.
SMALLEST_NORM = 1e-7
# ‖X‖_F beyond this squares past float32's range.
LARGEST_NORM = 1e18


def newton_schulz(x: Tensor, *, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """Polar factor of each matrix of ``x`` by an odd polynomial iteration.

    X₀ = X / ‖X‖_F (so that all singular values lie in [0, 1]), then for each (c₀, c₁, c₂) of the schedule
    X ← c₀ X + (c₁ A + c₂ A²) X with A = X Xᵀ; tall matrices are transposed first, so that A is the smaller
    Gram matrix.

    Args:
        x: (..., m, n), any floating dtype.
        schedule: the coefficients.
        dtype: dtype of the products.

    Returns:
        (..., m, n) in ``dtype``; zeros for a zero matrix.
    """
    tall = x.size(-2) > x.size(-1)
    y = _normalized(x, dtype=dtype)
    y = y.mT if tall else y
    for step in schedule.coefficients:
        gram = y @ y.mT
        # A product times 0 is no shortcut: PyTorch 2.13's addmm in bfloat16 takes sixty times as long with alpha=0.
        step = step[:2] if len(step) == 3 and step[2] == 0 else step
        if len(step) == 3 and y.ndim == 2:
            # The operations and their order are those of torch.optim.Muon, so that parity is bit-exact.
            a, b, c = step
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        else:
            y = step[0] * y + _weight(gram, step) @ y
    return y.mT if tall else y


def gram_newton_schulz(x: Tensor, *, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """The same polynomial in the Gram form, with restarts derived for a flat spectrum in ``dtype``.

    Args:
        x: (..., m, n), any floating dtype.
        schedule: the coefficients.
        dtype: dtype of the products.

    Returns:
        (..., m, n) in ``dtype``.
    """
    r = min(x.shape[-2:])
    lower = schedule.lower or 1e-2
    at = np.geomspace(lower, 1.0, 64)
    unit = torch.finfo(dtype).eps / 2
    # Divided by ‖X‖_F the eigenvalues' root mean square is at most r^(-½) for any spectrum.
    restarts = derive_restarts(schedule, at, roundoff=unit, spread=r**-0.5).restarts
    y = _normalized(x, dtype=dtype).reshape(-1, *x.shape[-2:])
    return torch.stack([gram_iteration(m, schedule=schedule, restarts=restarts) for m in y]).reshape(x.shape)


def _weight(gram: Tensor, step: tuple[float, ...]) -> Tensor:
    # (c₁ A + c₂ A² + …) without c₀ I, by Horner's rule.
    total = step[-1] * gram
    for c in reversed(step[1:-1]):
        total = c * gram + total @ gram
    return total


def _normalized(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype, copy=True)
    norm = y.norm(dim=(-2, -1), keepdim=True) if y.ndim > 2 else y.norm()
    # Compared as float32, since the limit rounds to infinity in float16, whose own range is always too small.
    usual = (norm.float() >= SMALLEST_NORM) & (norm.float() <= LARGEST_NORM) & (dtype != torch.float16)
    if y.device.type != "cpu" or not bool(usual.all()):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
        scale = torch.where(usual | (largest == 0), 1.0, largest).reshape(largest.shape)
        # Divided by 1 the usual matrix keeps its bits.
        wide = wide / scale
        if dtype == torch.float16:
            length = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
            wide = wide / torch.where(length == 0, 1.0, length)
        y = wide.to(dtype)
        norm = y.norm(dim=(-2, -1), keepdim=True) if y.ndim > 2 else y.norm()
    return y.div_(norm.clamp(min=SMALLEST_NORM))


def map_values(schedule: Schedule, values: np.ndarray, *, frobenius: float) -> np.ndarray:
    """What the iteration makes of singular values, in exact arithmetic: p(σ/‖X‖_F).

    Args:
        schedule: p.
        values: singular values.
        frobenius: ‖X‖_F.
    """
    mapped = np.asarray(values, dtype=np.float64) / frobenius
    for step in schedule.coefficients:
        mapped = evaluate(step, mapped)
    return mapped
