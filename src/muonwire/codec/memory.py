"""Strips and buffers: what keeps passes over large tensors inside a core's cache, and their pages cheap."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from muonwire.codec.host import CPU, on_host

# Values of one strip: a quarter of a megabyte of float32, so that it and a result of its size fit a second-level cache.
STRIP_NUMEL = 1 << 16
HUGE_PAGE_BYTES = 1 << 21


def strips(
    num_rows: int, row_numel: int, *, multiple: int = 1, device: torch.device = CPU
) -> Iterator[slice]:
    """Slices of as many rows as make a strip, a multiple of ``multiple`` each (but the last) and at least that.

    On an accelerator, whose calls cost more than its cache saves, one slice of all.

    >>> [s.start for s in strips(100, STRIP_NUMEL // 32)]
    [0, 32, 64, 96]
    """
    if not on_host(device):
        return iter([slice(0, num_rows)])
    step = multiple * max(1, STRIP_NUMEL // (multiple * max(row_numel, 1)))
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def uninitialized(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """A tensor as torch.empty gives; of the CPU on numpy's memory.

    Numpy asks for huge pages; the page faults of a fresh 16 MB otherwise cost more than the pass that fills it.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE_BYTES or not on_host(device):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(shape)
