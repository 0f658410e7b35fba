"""The lossless mean of R signs: how many of them are positive, entropy coded.

Where all replicas give a tensor one scale s, the mean of what they sent is s (2 n − R) / R, with n of R signs positive. Of
independent signs n has an entropy of about ½ log2(πe R / 2) bits: 1.5 at R = 2, 2.03 at 4, 3.05 at 16, 4.05 at 64.

Signs of real updates agree more often than that, and an entry's sums of two rounds are alike. So n is coded with a beta-binomial
distribution: signs are positive with a probability that is drawn for each entry from a beta distribution, whose mean is

    μ = middle + slope · (l / 32 − ½),    l = round(32 n' / R') of the entry's last sum n', which all replicas have seen.

Middle, slope and the beta distribution's concentration α + β are fitted to the piece, and travel with it, a byte each; and again
for the entries whose last signs were all alike (l = 0 or 32), which agree again or turn: in an embedding these are many. A replica
keeps a byte an entry, its level l.

A body holds R (varint), these three or six bytes, and the words of an ANS coder behind their length in bytes: first the entries of
the lowest level, in their order, then those of the next.

The distribution: Skellam, "A probability distribution derived from the binomial distribution" (1948).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from constriction import stream
from torch import Tensor

from muonwire.codec.host import CPU, on_host, quotient, send
from muonwire.codec.pack.ans import PRECISION, fixed_point_model
from muonwire.codec.pack.fields import Ints, pack_words, unpack_words
from muonwire.codec.payload import Reader, varint
from muonwire.errors import PayloadError

Floats = npt.NDArray[np.float64]
Levels = npt.NDArray[np.uint8]

# The level of an entry whose signs were all positive.
LARGEST_LEVEL = 32
_SLOPE_UNIT = 64
# Probabilities stay so far from 0 and 1.
_EDGE = 1 / 512
_CONCENTRATIONS = 72
_HEAD_BYTES = 3


@dataclass(frozen=True, kw_only=True)
class Known:
    """What all replicas know of the entries of a piece before its sums come.

    Args:
        count: number of entries.
        levels: of the last sums. Default: none are known; all are then taken as the middle one.
    """

    count: int
    levels: Levels | None = None

    @property
    def says_nothing(self) -> bool:
        """Whether all entries have the same level, which says nothing that a middle does not."""
        return self.levels is None or bool((self.levels == self.levels[0]).all())

    @cached_property
    def sizes(self) -> Ints:
        """How many entries each level has."""
        levels = np.full(self.count, LARGEST_LEVEL // 2) if self.levels is None else self.levels
        return np.bincount(levels, minlength=LARGEST_LEVEL + 1)

    @property
    def kinds(self) -> list[Ints]:
        """The levels that share a spread, of those that entries have: between the least and the largest, and these two."""
        present = np.flatnonzero(self.sizes)
        unanimous = (present == 0) | (present == LARGEST_LEVEL)
        return [of for of in (present[~unanimous], present[unanimous]) if of.size]

    @cached_property
    def order(self) -> Ints | slice:
        """Where the entries stand, level by level."""
        return slice(None) if self.levels is None else np.argsort(self.levels, kind="stable").astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the sums of some entries of a piece are distributed.

    Args:
        middle: from 0 to 255: the mean share of positive signs at the middle level is (middle + ½) / 256.
        slope: from −128 to 127: a level's distance from the middle, as a share, moves the mean by slope / 64 of it.
        concentration: from 0 to 71: α + β is (1 + (c mod 4) / 4) 2^(⌊c / 4⌋ − 3): from 1/8, where the signs of an entry are nearly
            all alike, to 28,672, where they are independent.
    """

    middle: int
    slope: int
    concentration: int

    @property
    def means(self) -> Floats:
        """μ of each level."""
        shares = np.arange(LARGEST_LEVEL + 1) / LARGEST_LEVEL - 0.5
        return ((self.middle + 0.5) / 256 + self.slope / _SLOPE_UNIT * shares).clip(_EDGE, 1 - _EDGE)

    def weights(self, replicas: int, mean: float) -> Floats:
        """What the probabilities of 0 … R positive signs are in proportion to, where their mean share is ``mean``.

        Arithmetic alone, which every machine rounds alike: P(k + 1) / P(k) = (R − k) (α + k) / ((k + 1) (β + R − k − 1)), from the
        mean on upwards and downwards.
        """
        total = (1 + self.concentration % 4 / 4) * 2.0 ** (self.concentration // 4 - 3)
        alpha, beta = mean * total, (1 - mean) * total
        k = np.arange(replicas, dtype=np.float64)
        more, fewer = (replicas - k) * (alpha + k), (k + 1) * (beta + (replicas - 1 - k))
        start = int(mean * replicas)
        above = np.cumprod(more[start:] / fewer[start:])
        below = np.cumprod((fewer[:start] / more[:start])[::-1])[::-1]
        return np.concatenate([below, [1.0], above])

    def bits(self, table: Ints) -> float:
        """What sums take that occur ``table[level, n]`` times."""
        bits = 0.0
        for row, mean in zip(table, self.means.tolist(), strict=True):
            if row.any():
                weights = self.weights(len(row) - 1, mean)
                bits -= float(row @ np.log2(np.maximum(weights / weights.sum(), 2.0**-PRECISION)))
        return bits


def models(spreads: Sequence[Spread], replicas: int, known: Known) -> Iterator[tuple[int, Any]]:
    """Of each level that entries have, in order: how many, and the model of their sums."""
    means = {
        int(level): (spread, float(spread.means[level]))
        for spread, levels in zip(spreads, known.kinds, strict=True)
        for level in levels
    }
    for level, (spread, mean) in sorted(means.items()):
        yield int(known.sizes[level]), fixed_point_model(spread.weights(replicas, mean))


def fit(counts: Ints, replicas: int, known: Known) -> list[Spread]:
    """Distributions in which these sums take few bits, of each kind of levels."""
    levels = np.full(1, LARGEST_LEVEL // 2) if known.levels is None else known.levels.astype(np.int64)
    size = LARGEST_LEVEL + 1
    cells = np.bincount(levels * (replicas + 1) + counts, minlength=size * (replicas + 1))
    table = cells.reshape(size, replicas + 1)
    return [_fit(np.where(np.isin(np.arange(size), of)[:, None], table, 0)) for of in known.kinds]


def _fit(table: Ints) -> Spread:
    """Of sums that occur ``table[level, n]`` times: least squares for the means, the best concentration for them."""
    size, replicas = len(table), table.shape[1] - 1
    entries = table.sum(1)
    count = int(entries.sum())
    found = np.arange(replicas + 1) / replicas
    shares = np.arange(size) / LARGEST_LEVEL - 0.5
    share, mean = float(entries @ shares) / count, float(table.sum(0) @ found) / count
    variance = float(entries @ (shares - share) ** 2)
    slope = float((shares - share) @ (table @ found)) / variance if variance else 0.0
    slope_units = min(max(round(slope * _SLOPE_UNIT), -128), 127)
    middle = int(256 * (mean - slope_units / _SLOPE_UNIT * share))
    spread = Spread(middle=min(max(middle, 0), 255), slope=slope_units, concentration=_CONCENTRATIONS - 1)
    # The variance of independent signs, and how many times larger the sums' is: (α + β + R) / (α + β + 1).
    means = spread.means
    independent = replicas * float(entries @ (means * (1 - means)))
    excess = float((table * (replicas * (found - means[:, None])) ** 2).sum()) / independent
    if excess > 1:
        total = max(replicas - excess, 2.0**-3) / (excess - 1)
        nearest = min(max(round(4 * (math.log2(total) + 3)), 0), _CONCENTRATIONS - 1)
        spread = replace(spread, concentration=nearest)
    return _nearby(spread, table)


def _nearby(spread: Spread, table: Ints) -> Spread:
    """The concentration to which steps go that save bits."""
    bits = spread.bits(table)
    for step in (-1, 1):
        while 0 <= spread.concentration + step < _CONCENTRATIONS:
            other = replace(spread, concentration=spread.concentration + step)
            if (of_other := other.bits(table)) >= bits:
                break
            spread, bits = other, of_other
    return spread


def positive(body: bytes, count: int, *, scale: bytes) -> Ints:
    """The signs (1 or 0) in a body of ``sign(scale=shared)`` or ``sign(scale=none)``.

    Args:
        body: bytes from outside.
        count: number of values.
        scale: the bytes of the scale that it must have; none for ``sign(scale=none)``.

    Raises:
        PayloadError: another length or scale, or bits behind the last value.
    """
    size = len(scale) + (count + 7) // 8
    if len(body) != size:
        raise PayloadError(
            f"payload: {len(body)} bytes of signs; {count} values with their scale take {size}"
        )
    if body[: len(scale)] != scale:
        raise PayloadError(
            f"payload: its scale is {body[: len(scale)].hex()}, all replicas have agreed on {scale.hex()} (bfloat16)"
        )
    bits = np.unpackbits(np.frombuffer(body, dtype=np.uint8, offset=len(scale)), bitorder="little")
    return bits[:count].astype(np.int64)


def mean(counts: Ints, replicas: int, *, scale: float, device: torch.device = CPU) -> Tensor:
    """s (2 n − R) / R in float32, to the bit what summing the replicas' ±s in any order and dividing by R gives.

    A scale in bfloat16 has eight bits, so that in float32 every sum of fewer than 2¹⁶ of them is exact.

    >>> mean(np.array([0, 1, 3]), 3, scale=0.5)
    tensor([-0.5000, -0.1667,  0.5000])
    """
    if on_host(device):
        total = torch.from_numpy(2 * counts - replicas).to(torch.float32) * scale
    else:
        # Small integers go to the device.
        narrow = counts.astype(np.uint8 if replicas < 1 << 8 else np.int32)
        total = send(torch.from_numpy(narrow), device).to(torch.int64).mul_(2).sub_(replicas).float() * scale
    # A sum of zeros is +0, whatever their signs.
    return quotient(total + 0.0, replicas)


def levels_of(counts: Ints, replicas: int) -> Levels:
    """The level of each sum: the share of positive signs in 32nds, halves rounded up.

    >>> levels_of(np.array([0, 1, 2, 3]), 3)
    array([ 0, 11, 21, 32], dtype=uint8)
    """
    return ((2 * LARGEST_LEVEL * counts + replicas) // (2 * replicas)).astype(np.uint8)


def pack(counts: Ints, replicas: int, known: Known | None = None) -> bytes:
    """The body of at least one count of positive signs.

    >>> pack(np.array([2, 2, 2]), 2).hex(" ")
    '02 ff 00 00 03 99 aa 01'

    Args:
        counts: from 0 to R.
        replicas: R.
        known: what ``unpack`` will be given. Default: nothing.
    """
    known = known or Known(count=len(counts))
    if known.says_nothing:
        known = Known(count=len(counts))
    spreads = fit(counts, replicas, known)
    symbols = counts[known.order].astype(np.int32)
    coder, end = stream.stack.AnsCoder(), len(symbols)
    for size, model in reversed(list(models(spreads, replicas, known))):
        coder.encode_reverse(symbols[end - size : end], model)
        end -= size
    heads = (bytes([s.middle, s.slope & 0xFF, s.concentration]) for s in spreads)
    return varint(replicas) + b"".join(heads) + pack_words(coder.get_compressed())


def unpack(body: bytes, count: int, *, largest: int, known: Known | None = None) -> tuple[Ints, int]:
    """The counts, and the number of replicas.

    Args:
        body: bytes from outside.
        count: how many counts, at least one.
        largest: most replicas that may have sent.
        known: what ``pack`` was given. Default: nothing.

    Raises:
        PayloadError: it is no body of so many counts.
    """
    known = known or Known(count=count)
    if known.says_nothing:
        known = Known(count=count)
    reader = Reader(body, 0)
    replicas = reader.varint("replicas")
    if not 1 <= replicas <= largest:
        raise PayloadError(
            f"payload: sums of {replicas} signs; at most {largest} replicas have sent, each one"
        )
    spreads = [_read_spread(reader) for _ in known.kinds]
    words, read = unpack_words(body[reader.position :])
    if read != reader.left:
        raise PayloadError(f"payload: {reader.left - read} bytes follow its coded words")
    coder = stream.stack.AnsCoder(words)
    symbols = [coder.decode(model, size) for size, model in models(spreads, replicas, known)]
    if not coder.is_empty():
        raise PayloadError(f"payload: {len(words)} coded words hold more than {count} sums")
    counts = np.empty(count, dtype=np.int64)
    counts[known.order] = np.concatenate(symbols)
    return counts, replicas


def _read_spread(reader: Reader) -> Spread:
    middle, slope, concentration = reader.take(_HEAD_BYTES, "spread of sums")
    if concentration >= _CONCENTRATIONS:
        raise PayloadError(
            f"payload: sums of concentration {concentration}; the largest is {_CONCENTRATIONS - 1}"
        )
    return Spread(middle=middle, slope=(slope ^ 0x80) - 0x80, concentration=concentration)


@lru_cache(maxsize=64)
def entropy_bits(replicas: int) -> float:
    """Entropy of the sum of independent signs, in bits.

    >>> [round(entropy_bits(r), 2) for r in (1, 2, 4, 16, 64)]
    [1.0, 1.5, 2.03, 3.05, 4.05]
    """
    whole = math.lgamma(replicas + 1) - replicas * math.log(2)
    logs = [whole - math.lgamma(n + 1) - math.lgamma(replicas - n + 1) for n in range(replicas + 1)]
    return -sum(math.exp(p) * p for p in logs) / math.log(2)


def estimate_bytes(count: int, replicas: int) -> int:
    """Bytes that ``pack`` is expected to give for independent signs."""
    words = round((count * entropy_bits(replicas) + PRECISION / 2) / 8)
    return len(varint(replicas)) + _HEAD_BYTES + len(varint(words)) + words
