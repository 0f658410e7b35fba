"""Tensors of which this process holds a shard (DTensor)."""

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor.

    >>> is_sharded(torch.zeros(2))
    False
    """
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's shard, in the memory of ``tensor``; the tensor itself where it is whole.

    >>> whole = torch.zeros(2)
    >>> local(whole) is whole
    True
    """
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        shard: Tensor = to_local()
        return shard
