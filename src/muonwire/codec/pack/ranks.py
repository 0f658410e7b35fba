"""The number of a choice among all choices."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from muonwire.codec.pack.base import Pack, starts
from muonwire.codec.pack.fields import Ints, pack_fields, unpack_fields
from muonwire.codec.select.base import Groups
from muonwire.errors import PayloadError, UsageError

LARGEST_TABLE = 1 << 16
# Reading a rank takes a search for each of its k items.
LARGEST_K = 16
# Ranks of 2^63 and more are Python integers: for few items, where a coder's first and last words would weigh.
LARGEST_COUNT = 512


@lru_cache(maxsize=256)
def num_choices(group_numel: int, k: int) -> int | None:
    """C(n, k) where ranks are quick to write and to read; None for the others, without computing a huge binomial."""
    quick = k in (0, group_numel) or (k <= LARGEST_K and (group_numel - k + 1) * k <= LARGEST_TABLE)
    return math.comb(group_numel, k) if quick else None


@lru_cache(maxsize=64)
def _table(group_numel: int, k: int) -> Any:
    """table[i, d] = C(d + i, i + 1) for d = 0 … n − k; each row is the running sum of the one before."""
    small = math.comb(group_numel, k) < 1 << 63
    rows = [np.arange(group_numel - k + 1, dtype=np.int64 if small else object)]
    for _ in range(k - 1):
        rows.append(np.cumsum(rows[-1]))
    return np.stack(rows)


@dataclass(frozen=True, kw_only=True)
class Ranks(Pack):
    """Each group's choice c_0 < … < c_{k−1} as its rank Σ C(c_i, i + 1) among all C(n, k), in ⌈log2 C(n, k)⌉ bits.

    Raises:
        UsageError: on use, for groups whose ranks would be long and many.

    Source: the combinatorial number system; Lehmer, "The machine tools of combinatorics" (1964).
    """

    name: ClassVar[str] = "ranks"

    @staticmethod
    def fits(groups: Groups) -> bool:
        """Whether a table of modest size gives the ranks of ``groups``, and they are 63-bit integers or few."""
        choices = num_choices(groups.group_numel, groups.k)
        return choices is not None and (choices < 1 << 63 or groups.count <= LARGEST_COUNT)

    @staticmethod
    def _bits(groups: Groups) -> tuple[int, int]:
        choices = num_choices(groups.group_numel, groups.k)
        if choices is None or not Ranks.fits(groups):
            raise UsageError(
                f"ranks: {groups.num_groups} choices of {groups.k} of {groups.group_numel} items have long ranks; use ans"
            )
        return choices, (choices - 1).bit_length()

    @override
    def encode(self, items: Ints, groups: Groups) -> bytes:
        _, width = self._bits(groups)
        if width == 0:
            return b""
        columns = np.arange(groups.k)
        offsets = items.reshape(groups.num_groups, groups.k) - starts(groups) - columns
        ranks = _table(groups.group_numel, groups.k)[columns, offsets].sum(axis=1)
        if ranks.dtype != object:
            return pack_fields(ranks, width)
        joined = sum(rank << (i * width) for i, rank in enumerate(ranks))
        return int(joined).to_bytes(self.estimate_bytes(groups), "little")

    @override
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        choices, width = self._bits(groups)
        if width == 0:
            inside = np.broadcast_to(np.arange(groups.k, dtype=np.int64), (groups.num_groups, groups.k))
            return (inside + starts(groups)).reshape(-1), 0
        size = self.estimate_bytes(groups)
        if len(data) < size:
            raise PayloadError(f"payload: {len(data)} bytes left; {groups.num_groups} ranks take {size}")
        table = _table(groups.group_numel, groups.k)
        if table.dtype == object:
            joined = int.from_bytes(data[:size], "little")
            fields = [(joined >> (i * width)) & ((1 << width) - 1) for i in range(groups.num_groups)]
            ranks = np.array(fields, dtype=object)
        else:
            ranks = unpack_fields(data[:size], groups.num_groups, width)
        if bool((ranks >= choices).any()):
            raise PayloadError(f"payload: rank {int(ranks.max())} of {choices} choices")
        items = np.empty((groups.num_groups, groups.k), dtype=np.int64)
        for i, row in reversed(list(enumerate(table))):
            offsets = np.searchsorted(row, ranks, side="right") - 1
            ranks = ranks - row[offsets]
            items[:, i] = offsets + i
        return (items + starts(groups)).reshape(-1), size

    @override
    def estimate_bytes(self, groups: Groups) -> int:
        """The exact number of bytes."""
        return (groups.num_groups * self._bits(groups)[1] + 7) // 8
