"""The polar factor without a host decision, for accelerators: few operations, since each costs more than its arithmetic."""

import math
from functools import cache

import torch
from torch import Tensor

from muonwire.polar.newton_schulz import iterate
from muonwire.polar.schedules import Schedule, mixed

NUM_STEPS = 6
# Of ‖X‖_F. With one step more than torch.optim.Muon takes, what lies above ends within 0.2 % of 1.
LOWER = 1e-3
SAFETY = 1.02


@cache
def device_schedule() -> Schedule:
    """The six quintic steps, made for σ from ``LOWER`` to 1."""
    return mixed(lower=LOWER, degrees=(5,) * NUM_STEPS, safety=SAFETY)


def device_polar(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Polar factor of each matrix, six quintic iterations on X / ‖X‖_F, no value read back by the host.

    The coefficients are those of the minimax composition for [10⁻³, 1] and the same for every matrix: a sixth step costs an
    accelerator less than a look at the spectrum, which is some hundred small operations. A zero matrix gives zeros, a non-finite
    one NaN.

    Args:
        x: (..., m, n), floating, not empty.
        dtype: of the products.

    Returns:
        (..., m, n) in ``dtype``.

    >>> q = device_polar(torch.eye(3, 5), dtype=torch.float32)
    >>> torch.allclose(q, torch.eye(3, 5), atol=3e-3)
    True
    """
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    # Divides zeros, and brings what is smaller still into the range.
    smallest = torch.finfo(y.dtype).tiny
    # Squares of the entries must not leave the range.
    y = y / torch.linalg.vector_norm(y, ord=math.inf, dim=(-2, -1), keepdim=True).clamp(min=smallest)
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True).clamp(min=smallest)
    return iterate(y.to(dtype), device_schedule())
