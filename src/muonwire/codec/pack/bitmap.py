"""One bit an item, and an entropy coder for the bits."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from constriction import stream

from muonwire.codec.pack.ans import fixed_point_model
from muonwire.codec.pack.base import Pack, checked
from muonwire.codec.pack.fields import Ints, pack_words, unpack_words
from muonwire.codec.select.base import Groups
from muonwire.errors import PayloadError


@lru_cache(maxsize=256)
def _byte_model(group_numel: int, k: int) -> Any:
    """Eight independent bits with P(1) = k / n: P(byte with c ones) = k^c (n − k)^(8 − c) / n^8, each rounded once."""
    by_ones = [k**c * (group_numel - k) ** (8 - c) / group_numel**8 for c in range(9)]
    return fixed_point_model(np.array([by_ones[byte.bit_count()] for byte in range(256)]))


@dataclass(frozen=True, kw_only=True)
class Bitmap(Pack):
    """A bit for each item, eight at a time by an ANS coder that knows their density: length in bytes (varint), words.

    Its time goes with all items and not with the chosen ones, so that it suits high densities.
    """

    name: ClassVar[str] = "bitmap"

    def encode(self, items: Ints, groups: Groups) -> bytes:
        """See Pack.encode."""
        if groups.k in (0, groups.group_numel) or groups.count == 0:
            return b""
        bits = np.zeros(groups.numel, dtype=np.uint8)
        bits[items] = 1
        coder = stream.stack.AnsCoder()
        octets = np.packbits(bits, bitorder="little").astype(np.int32)
        coder.encode_reverse(octets, _byte_model(groups.group_numel, groups.k))
        return pack_words(coder.get_compressed())

    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        """See Pack.decode."""
        if groups.k in (0, groups.group_numel) or groups.count == 0:
            return np.arange(groups.count, dtype=np.int64), 0
        words, read = unpack_words(data)
        coder = stream.stack.AnsCoder(words)
        octets = coder.decode(_byte_model(groups.group_numel, groups.k), (groups.numel + 7) // 8)
        items = np.flatnonzero(np.unpackbits(octets.astype(np.uint8), bitorder="little"))
        if not coder.is_empty() or items.size != groups.count:
            raise PayloadError(f"payload: a bitmap of {items.size} positions; {groups.count} are expected")
        return checked(items, groups), read

    def estimate_bytes(self, groups: Groups) -> int:
        """See Pack.estimate_bytes."""
        if groups.k in (0, groups.group_numel) or groups.count == 0:
            return 0
        p = groups.k / groups.group_numel
        size = math.ceil((groups.numel * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) + 12) / 8)
        return size + max(1, (size.bit_length() + 6) // 7)
