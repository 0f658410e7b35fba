"""Rice codes for the gaps between sorted items.

A Rice code with parameter b writes a gap g as g >> b ones-terminated zeros (unary) and the b low bits of g. For entries that
are selected independently with probability p the gaps are geometric and the best b costs at most a few hundredths of a bit
a gap over their entropy.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from muonwire.codec.pack.base import Pack, checked
from muonwire.codec.pack.fields import Ints, pack_fields, unpack_fields
from muonwire.codec.select.base import Groups
from muonwire.errors import PayloadError

LARGEST_RICE_BITS = 31


@dataclass(frozen=True, kw_only=True)
class Rice(Pack):
    """Gaps of all groups as Rice codes: b (u8), the low bits of all gaps, their unary parts."""

    name: ClassVar[str] = "rice"

    def encode(self, items: Ints, groups: Groups) -> bytes:
        """See Pack.encode."""
        if items.size == 0:
            return b""
        gaps = np.diff(items, prepend=-1) - 1
        b = _rice_bits(gaps)
        quotients = gaps >> b
        unary = np.zeros(int(quotients.sum()) + gaps.size, dtype=np.uint8)
        unary[np.cumsum(quotients + 1) - 1] = 1
        return bytes((b,)) + pack_fields(gaps, b) + np.packbits(unary, bitorder="little").tobytes()

    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        """See Pack.decode."""
        count, limit = groups.count, groups.numel
        if count == 0:
            return np.zeros(0, dtype=np.int64), 0
        b = data[0] if data else LARGEST_RICE_BITS + 1
        fields_bytes = (count * b + 7) // 8
        if b > LARGEST_RICE_BITS or len(data) < 1 + fields_bytes:
            raise PayloadError(
                f"payload: Rice parameter {b} with {count} positions does not fit its {len(data)} bytes"
            )
        low = unpack_fields(data[1 : 1 + fields_bytes], count, b)
        # A valid unary part has `count` ones and at most limit >> b zeros, which bounds what is looked at.
        longest = (count + (limit >> b) + 7) // 8
        unary = np.unpackbits(
            np.frombuffer(data[1 + fields_bytes : 1 + fields_bytes + longest], dtype=np.uint8),
            bitorder="little",
        )
        ends = np.flatnonzero(unary)[:count]
        if ends.size < count:
            raise PayloadError(f"payload: {ends.size} of {count} positions, then its bytes end")
        quotients = np.diff(ends, prepend=-1) - 1
        items = np.cumsum((quotients << b) + low + 1) - 1
        return checked(items, groups), 1 + fields_bytes + (int(ends[-1]) + 8) // 8

    def estimate_bytes(self, groups: Groups) -> int:
        """See Pack.estimate_bytes."""
        if groups.count == 0:
            return 0
        miss = 1 - groups.count / groups.numel
        best = min(b + 1 + (miss ** (1 << b)) / (1 - miss ** (1 << b)) for b in range(LARGEST_RICE_BITS))
        return 1 + round(groups.count * best / 8)


def _rice_bits(gaps: Ints) -> int:
    """The parameter b that costs the fewest bits: Σ (g >> b) + (b + 1) a gap."""
    start = max(int(np.log2(max(gaps.mean(), 1.0))) - 1, 0)
    return min(range(start, start + 3), key=lambda b: int((gaps >> b).sum()) + gaps.size * b)
