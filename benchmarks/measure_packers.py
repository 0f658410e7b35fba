"""Bits over log2 C(n, k) and MB/s (of the float32 tensor that was selected from) of every packer, as a table in Markdown.

    python benchmarks/measure_packers.py

`make measured` runs it, and decision 0010 quotes it. One core; the best of five repeats, in which the packers take turns. The
packers that ``ans`` was chosen over (Rice codes, a bitmap, items as they are) are defined here, since nothing sends them.
"""

import argparse
import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from constriction import stream
from typing_extensions import override

from muonwire.codec import Ans, Ranks
from muonwire.codec.pack import Pack
from muonwire.codec.pack.ans import fixed_point_model
from muonwire.codec.pack.base import checked, starts
from muonwire.codec.pack.fields import Ints, pack_fields, pack_words, unpack_fields, unpack_words
from muonwire.codec.select import Groups
from muonwire.errors import PayloadError

REPEATS = 5
CHUNK = 4096
CASES = [
    *(Groups(num_groups=256, group_numel=CHUNK, k=k) for k in (4, 8, 16, 32, 64)),
    *(
        Groups(num_groups=1, group_numel=512 * 2048, k=round(d * 512 * 2048))
        for d in (0.01, 0.02, 0.05, 0.1, 0.2)
    ),
    *(Groups(num_groups=16, group_numel=CHUNK, k=k) for k in (4, 8, 16, 32, 64)),
    *(Groups(num_groups=1, group_numel=1 << 16, k=round(d * (1 << 16))) for d in (0.01, 0.05, 0.2)),
    Groups(num_groups=1, group_numel=64, k=3),
]
LARGEST_RICE_BITS = 31


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=len(CASES), help="only so many of the last cases, which are the smallest"
    )
    num_cases = parser.parse_args().cases
    packers: list[Pack] = [Ans(), Rice(), Bitmap(), Ranks(), Bits()]
    print("| groups × items, k | " + " | ".join(map(str, packers)) + " |")
    print("|---|" + "---|" * len(packers))
    for groups in CASES[len(CASES) - num_cases :]:
        cells = " | ".join(measured(packers, groups))
        print(f"| {groups.num_groups} × {groups.group_numel}, {groups.k} | {cells} |", flush=True)


def drawn(groups: Groups) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = [
        np.sort(generator.choice(groups.group_numel, groups.k, replace=False)) + i * groups.group_numel
        for i in range(groups.num_groups)
    ]
    return np.concatenate(rows).astype(np.int64)


def bound_bits(groups: Groups) -> float:
    n, k = groups.group_numel, groups.k
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return groups.num_groups * nats / math.log(2)


def measured(packers: list[Pack], groups: Groups) -> list[str]:
    items = drawn(groups)
    encode: dict[Pack, float] = {}
    decode: dict[Pack, float] = {}
    sizes: dict[Pack, int] = {}
    for _ in range(REPEATS):
        for packer in packers:
            if isinstance(packer, Ranks) and not Ranks.fits(groups):
                continue
            start = time.perf_counter()
            data = packer.encode(items, groups)
            middle = time.perf_counter()
            decoded, _ = packer.decode(data, groups)
            end = time.perf_counter()
            assert (decoded == items).all()
            encode[packer] = min(encode.get(packer, math.inf), middle - start)
            decode[packer] = min(decode.get(packer, math.inf), end - middle)
            sizes[packer] = len(data)
    megabytes = groups.numel * 4 / 1e6
    return [
        f"{8 * sizes[p] / bound_bits(groups):.4f} ({megabytes / encode[p]:.0f}/{megabytes / decode[p]:.0f})"
        if p in sizes
        else "-"
        for p in packers
    ]


@dataclass(frozen=True, kw_only=True)
class Rice(Pack):
    """Gaps of all groups as Rice codes: b (u8), the low bits of all gaps, their unary parts."""

    name: ClassVar[str] = "rice"

    @override
    def encode(self, items: Ints, groups: Groups) -> bytes:
        if items.size == 0:
            return b""
        gaps = np.diff(items, prepend=-1) - 1
        b = _rice_bits(gaps)
        quotients = gaps >> b
        unary = np.zeros(int(quotients.sum()) + gaps.size, dtype=np.uint8)
        unary[np.cumsum(quotients + 1) - 1] = 1
        return bytes((b,)) + pack_fields(gaps, b) + np.packbits(unary, bitorder="little").tobytes()

    @override
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
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

    @override
    def estimate_bytes(self, groups: Groups) -> int:
        if groups.count == 0:
            return 0
        miss = 1 - groups.count / groups.numel
        best = min(b + 1 + (miss ** (1 << b)) / (1 - miss ** (1 << b)) for b in range(LARGEST_RICE_BITS))
        return 1 + round(groups.count * best / 8)


def _rice_bits(gaps: Ints) -> int:
    """The parameter b that costs the fewest bits: Σ (g >> b) + (b + 1) a gap."""
    start = max(int(np.log2(max(gaps.mean(), 1.0))) - 1, 0)
    return min(range(start, start + 3), key=lambda b: int((gaps >> b).sum()) + gaps.size * b)


@dataclass(frozen=True, kw_only=True)
class Bits(Pack):
    """Each item's number in its group of n, in ⌈log2 n⌉ bits: what peers send, without the rounding to whole bytes."""

    name: ClassVar[str] = "bits"

    @override
    def encode(self, items: Ints, groups: Groups) -> bytes:
        inside = items.reshape(groups.num_groups, groups.k) - starts(groups)
        return pack_fields(inside.reshape(-1), self._width(groups))

    @override
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        size = self.estimate_bytes(groups)
        if len(data) < size:
            raise PayloadError(f"payload: {len(data)} bytes left; {groups.count} positions take {size}")
        inside = unpack_fields(data[:size], groups.count, self._width(groups))
        items = (inside.reshape(groups.num_groups, groups.k) + starts(groups)).reshape(-1)
        if bool((np.diff(items) <= 0).any()):
            raise PayloadError("payload: positions do not ascend")
        return checked(items, groups), size

    @override
    def estimate_bytes(self, groups: Groups) -> int:
        """The exact number of bytes."""
        return (groups.count * self._width(groups) + 7) // 8

    @staticmethod
    def _width(groups: Groups) -> int:
        return max(groups.group_numel - 1, 0).bit_length()


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

    @override
    def encode(self, items: Ints, groups: Groups) -> bytes:
        if groups.k in (0, groups.group_numel) or groups.count == 0:
            return b""
        bits = np.zeros(groups.numel, dtype=np.uint8)
        bits[items] = 1
        coder = stream.stack.AnsCoder()
        octets = np.packbits(bits, bitorder="little").astype(np.int32)
        coder.encode_reverse(octets, _byte_model(groups.group_numel, groups.k))
        return pack_words(coder.get_compressed())

    @override
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        if groups.k in (0, groups.group_numel) or groups.count == 0:
            return np.arange(groups.count, dtype=np.int64), 0
        words, read = unpack_words(data)
        coder = stream.stack.AnsCoder(words)
        octets = coder.decode(_byte_model(groups.group_numel, groups.k), (groups.numel + 7) // 8)
        items = np.flatnonzero(np.unpackbits(octets.astype(np.uint8), bitorder="little"))
        if not coder.is_empty() or items.size != groups.count:
            raise PayloadError(f"payload: a bitmap of {items.size} positions; {groups.count} are expected")
        return checked(items, groups), read

    @override
    def estimate_bytes(self, groups: Groups) -> int:
        if groups.k in (0, groups.group_numel) or groups.count == 0:
            return 0
        p = groups.k / groups.group_numel
        size = math.ceil((groups.numel * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) + 12) / 8)
        return size + max(1, (size.bit_length() + 6) // 7)


if __name__ == "__main__":
    main()
