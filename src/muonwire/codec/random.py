"""Shared randomness: the same numbers on every replica and machine, out of the round's seed.

Everything derives from raw words of Philox4x64-10, a counter-based generator in integer arithmetic whose stream numpy
guarantees across machines and versions (that of distributions, and of torch's generators, is not guaranteed).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

import zlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muonwire.codec.host import CPU, on_host, send
from muonwire.codec.packing import unpack


def words(seed: int, stream: str, count: int) -> npt.NDArray[np.uint64]:
    """``count`` words of 64 random bits; fewer words of a stream are the beginning of more.

    Args:
        seed: 0 … 2⁶⁴ − 1; the round's has 32 bits.
        stream: what they are for; streams of different names have nothing in common.
        count: how many.

    >>> [hex(word) for word in words(1, "example", 2)]
    ['0xe233f6bcb47cc6e0', '0xa5dcf0fc3ddc3e52']
    """
    key = np.array((seed, zlib.crc32(stream.encode())), dtype=np.uint64)
    # Little-endian in memory, so that parts of words are the same on all machines.
    return np.random.Philox(key=key).random_raw(count).astype("<u8", copy=False)


def signs(seed: int, stream: str, count: int, device: torch.device = CPU) -> Tensor:
    """``count`` random signs, +1 or −1 in float32, one bit each."""
    drawn = words(seed, stream, -(-count // 64)).view(np.uint8)
    if on_host(device):
        bits = torch.from_numpy(np.unpackbits(drawn, count=count, bitorder="little"))
    else:
        bits = unpack(send(torch.from_numpy(drawn), device), count, 1)
    return bits.to(torch.float32).mul_(-2).add_(1)


def uniform(seed: int, stream: str, count: int) -> Tensor:
    """``count`` multiples of 2⁻⁵³ in [0, 1), float64."""
    return torch.from_numpy((words(seed, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def subsets(seed: int, stream: str, num_groups: int, group_numel: int, k: int) -> Tensor:
    """Which ``k`` of each group's items, all choices equally likely: sorted items (int64), numbered through all groups.

    Every item draws 32 bits and the ``k`` smallest of a group are chosen, equal draws in the order of items (which makes the
    choice uneven by less than group_numel · 2⁻³²). No result of a sort is used, since the order of equal keys is the sort's own.

    Args:
        seed, stream: see ``words``.
        num_groups, group_numel: the items.
        k: how many of each group, 0 … group_numel.

    >>> subsets(1, "example", num_groups=2, group_numel=5, k=2)
    tensor([2, 4, 5, 9])
    """
    if num_groups * k == 0:
        return torch.zeros(0, dtype=torch.int64, device=CPU)
    numel = num_groups * group_numel
    draws = words(seed, stream, -(-numel // 2)).view("<u4")[:numel].reshape(num_groups, group_numel)
    largest = np.partition(draws, k - 1, axis=1)[:, k - 1 : k]
    chosen = draws < largest
    missing = k - chosen.sum(axis=1, keepdims=True)
    equal = draws == largest
    if equal.sum() > num_groups:
        equal &= equal.cumsum(axis=1) <= missing
    return torch.from_numpy(np.flatnonzero(chosen | equal))
