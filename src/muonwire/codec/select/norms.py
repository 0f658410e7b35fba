"""What selections by norm share."""

import torch
from torch import Tensor


def squared_norms(entries: Tensor, *, dim: int | tuple[int, ...]) -> Tensor:
    """Sums of squares over ``dim``, in float64: a float32 overflows from 2e19 on and vanishes below 3e-23."""
    return (
        entries.to(torch.float64).square_().sum(dim)
        if entries.dtype != torch.float64
        else entries.square().sum(dim)
    )


def largest(norms: Tensor, k: int) -> Tensor:
    """The sorted indices of the ``k`` largest of a vector; of equal ones the first.

    >>> largest(torch.tensor([1.0, 2.0, 1.0, 3.0]), 3)
    tensor([0, 1, 3])
    """
    return norms.sort(descending=True, stable=True).indices[:k].sort().values
