"""Items as they are."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from muonwire.codec.pack.base import Pack, checked, starts
from muonwire.codec.pack.fields import Ints, pack_fields, unpack_fields
from muonwire.codec.select.base import Groups
from muonwire.errors import PayloadError


@dataclass(frozen=True, kw_only=True)
class Bits(Pack):
    """Each item's number in its group of n, in ⌈log2 n⌉ bits: what peers send, without the rounding to whole bytes."""

    name: ClassVar[str] = "bits"

    def encode(self, items: Ints, groups: Groups) -> bytes:
        """See Pack.encode."""
        inside = items.reshape(groups.num_groups, groups.k) - starts(groups)
        return pack_fields(inside.reshape(-1), self._width(groups))

    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        """See Pack.decode."""
        size = self.estimate_bytes(groups)
        if len(data) < size:
            raise PayloadError(f"payload: {len(data)} bytes left; {groups.count} positions take {size}")
        inside = unpack_fields(data[:size], groups.count, self._width(groups))
        items = (inside.reshape(groups.num_groups, groups.k) + starts(groups)).reshape(-1)
        if bool((np.diff(items) <= 0).any()):
            raise PayloadError("payload: positions do not ascend")
        return checked(items, groups), size

    def estimate_bytes(self, groups: Groups) -> int:
        """See Pack.estimate_bytes; exact."""
        return (groups.count * self._width(groups) + 7) // 8

    @staticmethod
    def _width(groups: Groups) -> int:
        return max(groups.group_numel - 1, 0).bit_length()
