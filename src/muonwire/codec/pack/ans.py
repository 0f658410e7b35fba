"""Asymmetric numeral systems for the gaps between chosen items, within about a per cent of the entropy.

Where all choices of k items of a group of n are equally likely, every gap g between neighbours has the same distribution, the
negative hypergeometric one: P(gap ≥ g) = C(n − g, k) / C(n, k). It depends on n and k alone, which both sides know, so that
no model travels. A group's k gaps are coded one by one with it: they are taken as independent, which costs 2 % at k = 4,
0.9 % at 32, and nothing that can be measured for one large group.

Source: Duda, "Asymmetric numeral systems", arXiv 1311.2540; the coder is the library `constriction` (Bamler, arXiv 2201.01741).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from constriction import stream
from typing_extensions import override

from muonwire.codec.pack.base import Pack, gaps_of, items_of
from muonwire.codec.pack.fields import Ints, pack_words, unpack_words
from muonwire.codec.pack.ranks import Ranks
from muonwire.codec.select.base import Groups
from muonwire.errors import PayloadError

# The coder's probabilities are multiples of 2^-24.
PRECISION = 24
# A table ends where one gap of 2^22 lies behind it, so that most messages have no escape.
TAIL = 2.0**-22
LARGEST_TABLE = 1 << 12
# Over a bucket of gaps that is at most this part of their mean the distribution is nearly flat: w²/24 nats are lost a gap.
FLAT = 1 / 3


def fixed_point_model(probabilities: Any) -> Any:
    """A categorical model whose integer frequencies follow from ``probabilities`` (at least two, float64) on every machine alike.

    `constriction` turns weights f into frequencies 1 + f · (2^24 − size) / Σf; with integers of that sum it rounds nothing.
    """
    total = (1 << PRECISION) - len(probabilities)
    weights = np.floor(probabilities * (total / float(np.cumsum(probabilities)[-1])))
    weights[np.argmax(weights)] += total - weights.sum()
    return stream.model.Categorical(weights, perfect=False)


@dataclass(frozen=True, kw_only=True)
class GapModel:
    """How a gap is coded: ``gap >> low_bits`` by ``high``, whose last symbol says "go on from here"; the low bits as they are."""

    high: Any
    escape: int
    low_bits: int
    bits: float

    @property
    def low(self) -> Any:
        """The model of the low bits."""
        return stream.model.Uniform(1 << self.low_bits)


@lru_cache(maxsize=256)
def gap_model(group_numel: int, k: int) -> GapModel:
    """The model of each gap where ``k`` of ``group_numel`` items are chosen; IEEE arithmetic alone: no exp, log or power."""
    mean = (group_numel - k) / (k + 1)
    low_bits = 0
    while low_bits < PRECISION - 1 and (2 << low_bits) <= FLAT * mean:
        low_bits += 1
    width = 1 << low_bits
    # P(gap ≥ g + 1) / P(gap ≥ g) = (n − k − g) / (n − g); over a bucket, its power at the bucket's middle.
    size = min(LARGEST_TABLE, (group_numel - k) // width + 1)
    middle = np.arange(size, dtype=np.float64) * width + (width - 1) / 2
    ratio = np.maximum(group_numel - k - middle, 0) / (group_numel - middle)
    for _ in range(low_bits):
        ratio = ratio * ratio
    above = np.cumprod(ratio)
    escape = min(int(np.count_nonzero(above > TAIL)) + 1, size)
    above = np.concatenate([[1.0], above[:escape]])
    probabilities = np.append(above[:-1] - above[1:], above[-1])
    likely = probabilities[probabilities > 0]
    return GapModel(
        high=fixed_point_model(probabilities),
        escape=escape,
        low_bits=low_bits,
        bits=low_bits - float((likely * np.log2(likely)).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class Ans(Pack):
    """Gaps by an ANS coder whose model follows from the groups: the length of the words in bytes (varint), the words.

    Groups with few choices go as their ranks instead (see Ranks): exact, and without a coder's first and last words.
    """

    name: ClassVar[str] = "ans"

    @override
    def encode(self, items: Ints, groups: Groups) -> bytes:
        if Ranks.fits(groups):
            return Ranks().encode(items, groups)
        model = gap_model(groups.group_numel, groups.k)
        gaps = gaps_of(items, groups)
        coder = stream.stack.AnsCoder()
        if model.low_bits:
            coder.encode_reverse((gaps & ((1 << model.low_bits) - 1)).astype(np.int32), model.low)
            gaps >>= model.low_bits
        if int(gaps.max()) >= model.escape:
            escapes = gaps // model.escape
            symbols = np.full(gaps.size + int(escapes.sum()), model.escape, dtype=np.int32)
            symbols[np.cumsum(escapes + 1) - 1] = gaps - escapes * model.escape
        else:
            symbols = gaps.astype(np.int32)
        coder.encode_reverse(symbols, model.high)
        return pack_words(coder.get_compressed())

    @override
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        if Ranks.fits(groups):
            return Ranks().decode(data, groups)
        model = gap_model(groups.group_numel, groups.k)
        words, read = unpack_words(data)
        coder = stream.stack.AnsCoder(words)
        symbols = coder.decode(model.high, groups.count)
        escapes = symbols == model.escape
        gaps = (
            self._joined(symbols, escapes, coder, model, groups)
            if escapes.any()
            else symbols.astype(np.int64)
        )
        if model.low_bits:
            gaps <<= model.low_bits
            gaps += coder.decode(model.low, groups.count)
        if not coder.is_empty():
            raise PayloadError(
                f"payload: {read} bytes of coded words hold more than {groups.count} positions"
            )
        return items_of(gaps, groups), read

    @staticmethod
    def _joined(symbols: Any, escapes: Any, coder: Any, model: GapModel, groups: Groups) -> Ints:
        """Decode the symbols that stand behind escapes, and add up the symbols of each gap."""
        # An escape stands for at least this many items, of which there are only so many.
        most = groups.numel // (model.escape << model.low_bits)
        parts, num_escapes, missing = [symbols], 0, int(np.count_nonzero(escapes))
        while missing:
            num_escapes += missing
            if num_escapes > most:
                raise PayloadError(f"payload: coded gaps leave the {groups.numel} items of their groups")
            parts.append(coder.decode(model.high, missing))
            missing = int(np.count_nonzero(parts[-1] == model.escape))
        symbols = np.concatenate(parts).astype(np.int64)
        ends = np.flatnonzero(symbols != model.escape)
        return np.diff(np.cumsum(symbols)[ends], prepend=0)

    @override
    def estimate_bytes(self, groups: Groups) -> int:
        if Ranks.fits(groups):
            return Ranks().estimate_bytes(groups)
        # The coder starts empty, which costs about as much as its precision less the first symbol.
        size = math.ceil((groups.count * gap_model(groups.group_numel, groups.k).bits + PRECISION / 2) / 8)
        return size + max(1, (size.bit_length() + 6) // 7)
