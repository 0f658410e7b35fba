"""Whether all values of a tensor are finite, at the speed of memory."""

import math

import torch
from torch import Tensor

from muonwire.errors import UsageError


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN.

    A sum that is finite has finite terms only, and costs one pass; only where it is not are the values looked at one by one,
    since large finite values may overflow it.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def check_finite(tensor: Tensor) -> None:
    """Raise UsageError where a value is infinite or NaN, which no codec takes."""
    if not all_finite(tensor):
        raise UsageError(f"codec: the tensor of shape {tuple(tensor.shape)} holds a value that is not finite")
