"""The Newton-Schulz family with a given schedule: matrix products only, scaled by the Frobenius norm."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.gram import gram_iteration
from muonwire.polar.restarts import derive_restarts
from muonwire.polar.schedules import Schedule

# Below this Frobenius norm torch.optim.Muon divides by this instead; the matrix is rescaled first to keep
# clear of it.
SMALLEST_NORM = 1e-7
# ‖X‖_F beyond this squares past float32's range.
LARGEST_NORM = 1e18
# CANS maps 1.0001 out of its stable interval, and a matrix of one large row has σ_max = ‖X‖_F up to a few roundings.
MARGIN_ROUNDOFFS = 4


def newton_schulz(x: Tensor, *, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """Polar factor of each matrix of ``x`` by an odd polynomial iteration.

    X₀ = X / ‖X‖_F (so that all singular values lie in [0, 1]; a little less where the schedule is unstable just
    past 1), then for each (c₀, c₁, c₂) of the schedule X ← c₀ X + (c₁ A + c₂ A²) X with A = X Xᵀ; tall matrices
    are transposed first, so that A is the smaller Gram matrix.

    Args:
        x: (..., m, n), any floating dtype.
        schedule: the coefficients.
        dtype: dtype of the products.

    Returns:
        (..., m, n) in ``dtype``; zeros for a zero matrix.
    """
    return iterate(normalized(x, margin=_margin(schedule, torch.finfo(dtype).eps / 2), dtype=dtype), schedule)


def iterate(x: Tensor, schedule: Schedule) -> Tensor:
    """The iteration itself, on matrices that are scaled already.

    Args:
        x: (..., m, n), in the dtype of the products.
        schedule: the coefficients.
    """
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    batched = y.ndim > 3
    y = y.flatten(0, -3) if batched else y
    multiply, add = (torch.mm, torch.addmm) if y.ndim == 2 else (torch.bmm, torch.baddbmm)
    for step in schedule.coefficients:
        gram = multiply(y, y.mT)
        # A product times 0 is no shortcut: PyTorch 2.13's addmm in bfloat16 takes sixty times as long with alpha=0.
        step = step[:2] if len(step) == 3 and step[2] == 0 else step
        if len(step) == 3:
            # The operations and their order are those of torch.optim.Muon, so that parity is bit-exact.
            a, b, c = step
            y = add(y, add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        else:
            y = step[0] * y + _weight(gram, step) @ y
    y = y.reshape(*x.shape[:-2], *y.shape[-2:]) if batched else y
    return y.mT if tall else y


def gram_newton_schulz(x: Tensor, *, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """The same polynomial in the Gram form, with restarts derived for the worst spectrum in ``dtype``.

    A schedule that is unstable just past 1 takes the plain iteration.

    Args:
        x: (..., m, n), any floating dtype.
        schedule: the coefficients.
        dtype: dtype of the products.

    Returns:
        (..., m, n) in ``dtype``.
    """
    if _margin(schedule, torch.finfo(dtype).eps / 2) > 1:
        # The Gram form rounds W itself, and with it every singular value.
        return newton_schulz(x, schedule=schedule, dtype=dtype)
    lower = schedule.lower or 1e-2
    at = np.geomspace(lower, 1.0, 64)
    unit = torch.finfo(dtype).eps / 2
    y = normalized(x, margin=1.0, dtype=dtype).reshape(-1, *x.shape[-2:])
    # A few heavy rows, as momenta have them, make rounding errors that do not average out: nothing is assumed of the spectrum.
    restarts = derive_restarts(schedule, at, roundoff=unit, spread=1.0).restarts
    return torch.stack([gram_iteration(m, schedule=schedule, restarts=restarts) for m in y]).reshape(x.shape)


def _weight(gram: Tensor, step: tuple[float, ...]) -> Tensor:
    # (c₁ A + c₂ A² + …) without c₀ I, by Horner's rule.
    total = step[-1] * gram
    for c in reversed(step[1:-1]):
        total = c * gram + total @ gram
    return total


@lru_cache(maxsize=256)
def _margin(schedule: Schedule, roundoff: float) -> float:
    """What ‖X‖_F is multiplied by: 1, unless rounding could take a singular value of 1 out of the schedule's stable interval."""
    wanted = 1 + MARGIN_ROUNDOFFS * roundoff
    return max(1.0, wanted / schedule.stable_interval())


def normalized(x: Tensor, *, dtype: torch.dtype, margin: float = 1.0) -> Tensor:
    """Each matrix of ``x`` divided by its Frobenius norm, so that its singular values lie in [0, 1]; NaN where it is not finite.

    Args:
        x: (..., m, n), any floating dtype, of any scale.
        dtype: of the result.
        margin: the norm is multiplied by this first. Default: 1.
    """
    if x.ndim == 2 and x.device.type == "cpu" and dtype != torch.float16:
        # One usual matrix, as an optimizer's: few operations, each of which costs microseconds.
        y = x.to(dtype)
        norm = torch.linalg.vector_norm(y)
        if SMALLEST_NORM <= norm.item() <= LARGEST_NORM:
            # Multiplied by 1 the norm keeps its bits, on which parity with torch.optim.Muon rests.
            return torch.div(y, norm if margin == 1 else norm * margin)
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
    # Multiplied by 1 the norm keeps its bits, on which parity with torch.optim.Muon rests.
    return y.div_(norm.clamp(min=SMALLEST_NORM) * margin)
