"""Polar factors: from a matrix to the nearest semi-orthogonal one.

>>> import torch
>>> q = polar(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), method="svd")
>>> torch.allclose(q @ q.mT, torch.eye(4), atol=1e-5)
True
"""

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.newton_schulz import newton_schulz
from muonwire.polar.schedules import POLAR_EXPRESS, SCHEDULES, Schedule

__all__ = ["METHODS", "SCHEDULES", "Schedule", "polar"]

METHODS = ("auto", "newton_schulz", "svd")


def polar(
    x: Tensor,
    *,
    method: str = "auto",
    schedule: Schedule | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Polar factor U Vᵀ of each matrix X = U S Vᵀ of ``x``: the nearest semi-orthogonal matrix.

    Args:
        x: (..., m, n), floating. A zero matrix has the zero matrix as its result.
        method: "newton_schulz" (matrix products), "svd" (exact, slow), or "auto" (newton_schulz).
        schedule: coefficients for newton_schulz, or their name. Default: "polar_express".
        dtype: dtype of the products. Default: bfloat16 for newton_schulz, float32 (or x's, if wider) for svd.

    Returns:
        (..., m, n), in the dtype of ``x``.

    Raises:
        UsageError: x is not a floating tensor of at least two dimensions; method or schedule is unknown.

    Source: Jordan et al., "Muon" (2024); Amsel et al., "The Polar Express", arXiv 2505.16932.
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise UsageError(f"polar: x is {x.dtype} of shape {tuple(x.shape)}; it takes floating (..., m, n)")
    if method not in METHODS:
        raise UsageError(f"polar: method is {method!r}; allowed are {', '.join(METHODS)}")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise UsageError(f"polar: schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}")
        schedule = SCHEDULES[schedule]
    if x.numel() == 0:
        return x.clone()
    if method == "svd":
        left, values, right = torch.linalg.svd(
            x.to(dtype or torch.promote_types(x.dtype, torch.float32)), full_matrices=False
        )
        resolved = values > values[..., :1] * torch.finfo(values.dtype).eps
        return ((left * resolved.unsqueeze(-2)) @ right).to(x.dtype)
    return newton_schulz(x, schedule=schedule or POLAR_EXPRESS, dtype=dtype or torch.bfloat16).to(x.dtype)
