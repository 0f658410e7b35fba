"""The Newton-Schulz family: matrix products only, so that it runs at the speed of the hardware's products."""

import torch
from torch import Tensor

from muonwire.polar.schedules import Schedule

# Below this Frobenius norm a matrix counts as zero, and its polar factor is taken as zero.
SMALLEST_NORM = 1e-7


def newton_schulz(x: Tensor, *, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    """Polar factor of each matrix of ``x`` by an odd polynomial iteration.

    X₀ = X / ‖X‖_F (so that all singular values lie in [0, 1]), then for each (a, b, c) of the schedule
    X ← a X + (b A + c A²) X with A = X Xᵀ; tall matrices are transposed first, so that A is the smaller Gram matrix.

    Args:
        x: (..., m, n), any floating dtype.
        schedule: the coefficients.
        dtype: dtype of the products.

    Returns:
        (..., m, n) in ``dtype``.
    """
    tall = x.size(-2) > x.size(-1)
    # The operations and their order are those of torch.optim.Muon for 2-D input, so that parity is bit-exact.
    y = x.to(dtype, copy=True)
    y = y.mT if tall else y
    norm = y.norm(dim=(-2, -1), keepdim=True) if y.ndim > 2 else y.norm()
    y = y.div_(norm.clamp(min=SMALLEST_NORM))
    for a, b, c in schedule.coefficients:
        gram = y @ y.mT
        if y.ndim == 2:
            y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        else:
            y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.mT if tall else y
