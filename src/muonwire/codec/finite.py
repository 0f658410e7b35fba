"""Whether all values of a tensor are finite, at the speed of memory."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from muonwire.codec.host import codes_there, fetch, on_host
from muonwire.errors import UsageError


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN.

    A sum that is finite has finite terms only, and costs one pass; only where it is not are the values looked at one by one,
    since large finite values may overflow it.

    >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, float("nan")]))
    (True, False)
    """
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def each_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """``all_finite`` of each, for which the host waits once a device.

    >>> each_finite([torch.tensor([3e38, 3e38]), torch.tensor([1.0, float("nan")])])
    [True, False]
    """
    checks = Checks()
    for tensor in tensors:
        checks.add(tensor)
    return checks.results(fetch(checks.sums))


def check_finite(tensor: Tensor) -> None:
    """Raise UsageError where a value is infinite or NaN, which no codec takes."""
    if not all_finite(tensor):
        raise UsageError(f"codec: the tensor of shape {tuple(tensor.shape)} holds a value that is not finite")


class Checks:
    """Which of several tensors are finite: those in the host's memory at once, those on a device when their sums have crossed.

    On a device the sums are taken in float64, which those of float32 values do not overflow; where it has none the host waits.
    """

    def __init__(self) -> None:
        # What is to be fetched.
        self.sums: list[Tensor] = []
        # None: its sum tells.
        self._known: list[bool | None] = []

    def add(self, tensor: Tensor) -> bool:
        """Add the next tensor; False where it is known already that it is not finite."""
        if on_host(tensor.device) or not codes_there(tensor.device):
            self._known.append(all_finite(tensor))
            return bool(self._known[-1])
        self._known.append(None)
        self.sums.append(tensor.sum(dtype=torch.float64))
        return True

    def add_finite(self) -> None:
        """Add a tensor that is known to be finite."""
        self._known.append(True)

    def results(self, fetched: Sequence[Sequence[float]]) -> list[bool]:
        """Of all tensors in order, from the values of ``sums``."""
        sums = iter(fetched)
        return [math.isfinite(next(sums)[0]) if known is None else known for known in self._known]
