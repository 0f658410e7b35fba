"""Buffers kept between calls: an optimizer orthogonalizes the same shapes at every step."""

import threading
from collections import OrderedDict

import torch
from torch import Tensor

# A model has a handful of distinct hidden shapes, and each uses about six buffers.
MAX_BUFFERS = 96

_local = threading.local()


def buffer(slot: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor that the next call with the same arguments on the same thread gets again.

    Args:
        slot: what it is for; two buffers in use at once need two slots.
        shape, dtype, device: its own.

    >>> a = buffer("gram", (2, 2), torch.float32, torch.device("cpu"))
    >>> a is buffer("gram", (2, 2), torch.float32, torch.device("cpu"))
    True
    """
    kept: OrderedDict[object, Tensor] | None = getattr(_local, "kept", None)
    if kept is None:
        kept = _local.kept = OrderedDict()
    key = (slot, shape, dtype, device)
    found = kept.get(key)
    if found is None:
        # Made outside inference mode, or a later call that records gradients could not write to it.
        with torch.inference_mode(False):
            found = kept[key] = torch.empty(shape, dtype=dtype, device=device)
        if len(kept) > MAX_BUFFERS:
            kept.popitem(last=False)
    else:
        kept.move_to_end(key)
    return found


def clear_buffers() -> None:
    """Free this thread's buffers.

    >>> clear_buffers()
    """
    _local.kept = OrderedDict()
