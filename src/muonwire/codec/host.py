"""The way between an accelerator's memory and the host's: what has to cross, gathered into one transfer.

The host waits for a device whenever it reads a value of it. So a codec leaves its bytes on the device as ``Field``s, and whoever
needs them fetches those of all tensors at once. Bytes on their way to the device are not waited for.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
# Kinds of devices without float64, in which codecs add.
WITHOUT_FLOAT64 = {"mps"}
# Of fewer bytes the driver keeps a copy of its own.
_SMALLEST_PINNED = 1 << 16
_NUMPY: dict[torch.dtype, Any] = {
    torch.uint8: np.uint8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


def as_bytes(values: Any) -> bytes:
    """An array's own bytes."""
    data: bytes = values.tobytes()
    return data


class Field(NamedTuple):
    """A part of a body.

    Args:
        values: on the device, uint8, or integers of 2, 4 or 8 bytes.
        write: makes the bytes of the values, a numpy array then. Default: their own.
    """

    values: Tensor
    write: Callable[[Any], bytes] = as_bytes


def on_host(device: torch.device) -> bool:
    """Whether its memory is the host's."""
    return device.type == "cpu"


def codes_there(device: torch.device) -> bool:
    """Whether codecs work on the device. Where it has no float64 they work in the host's memory, and whole tensors cross."""
    return device.type not in WITHOUT_FLOAT64


def length_of(tensor: Tensor) -> Tensor:
    """‖tensor‖_F, float64 without dimensions; in the host's memory where the tensor's device has no float64."""
    here = tensor if codes_there(tensor.device) else tensor.cpu()
    length: Tensor = torch.linalg.vector_norm(here, dtype=torch.float64)
    return length


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on ``device``; the host does not wait for one that comes from its own memory, which nobody writes to any more."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and on_host(tensor.device) and tensor.nbytes > _SMALLEST_PINNED:
        # Out of other memory the driver copies piece by piece, and may wait for what the device has to do before.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=on_host(tensor.device))


def octets(data: bytes | memoryview, device: torch.device) -> Tensor:
    """Bytes as a tensor (uint8) on ``device``, which is not to be written to."""
    if not data:
        return torch.empty(0, dtype=torch.uint8, device=device)
    # A copy, since torch warns of memory that cannot be written to.
    return send(torch.frombuffer(bytearray(data), dtype=torch.uint8), device)


def fetch(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of tensors as numpy arrays (1-D), with one transfer from each device.

    >>> [a.tolist() for a in fetch([torch.tensor([1, 2], dtype=torch.uint8), torch.tensor(0.5, dtype=torch.float64)])]
    [[1, 2], [0.5]]

    Args:
        tensors: uint8, int16, int32, int64, float32 or float64.
    """
    found: list[Any] = [t.numpy().reshape(-1) if t.is_cpu else None for t in tensors]
    away: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if found[i] is None:
            away.setdefault(tensor.device, []).append(i)
    for indices in away.values():
        flat = [tensors[i].reshape(-1).view(torch.uint8) for i in indices]
        together = torch.cat(flat).cpu().numpy()
        ends = np.cumsum([len(f) for f in flat])
        for i, end, own in zip(indices, ends, flat, strict=True):
            found[i] = together[end - len(own) : end].view(_NUMPY[tensors[i].dtype])
    return found


def quotient(total: Tensor, count: int) -> Tensor:
    """total / count, each entry rounded once, so that it has the same bits on all machines.

    By a number of the host CUDA would divide by multiplying by its reciprocal, which rounds twice.
    """
    if on_host(total.device):
        return total / count
    return total / torch.full((), count, dtype=total.dtype, device=total.device)


def running_sums(terms: Tensor) -> Tensor:
    """``terms.cumsum(-1)``, whose order of additions an accelerator may choose anew in each run; here it does not.

    >>> running_sums(torch.tensor([1.0, 2.0, 4.0]))
    tensor([1., 3., 7.])
    """
    if on_host(terms.device):
        return terms.cumsum(-1)
    distance = 1
    while distance < terms.shape[-1]:
        further = terms[..., distance:] + terms[..., :-distance]
        terms = torch.cat([terms[..., :distance], further], dim=-1)
        distance *= 2
    return terms


def flagged(flags: Tensor, count: int) -> Tensor:
    """Where ``count`` flags (1-D, bool) are set, in order (int64): ``nonzero`` without asking the device for their number.

    >>> flagged(torch.tensor([False, True, False, True]), 2)
    tensor([1, 3])
    """
    if on_host(flags.device):
        return flags.nonzero().view(-1)
    # The n-th of the set ones goes to place n, the others to a place behind the last.
    places = torch.where(flags, flags.cumsum(0) - 1, count).clamp_(max=count)
    numbers = torch.arange(len(flags), device=flags.device)
    return torch.zeros(count + 1, dtype=torch.int64, device=flags.device).scatter_(0, places, numbers)[:count]


def counts_of(index: Tensor, size: int) -> Tensor:
    """How often each of 0 ... size − 1 occurs (int64): ``bincount`` without asking the device for the largest."""
    if on_host(index.device):
        return torch.bincount(index, minlength=size)
    zeros = torch.zeros(size, dtype=torch.int64, device=index.device)
    return zeros.index_add_(0, index, torch.ones_like(index, dtype=torch.int64))
