"""The lossless mean of R signs: how many of them are positive, entropy coded.

Where all replicas give a tensor one scale s, the mean of what they sent is s (2 n − R) / R, with n of R signs positive. Of
independent signs n has an entropy of about ½ log2(πe R / 2) bits: 1.5 at R = 2, 2.03 at 4, 3.05 at 16, 4.05 at 64.

A body holds, in varints, R, the least n, the span from the least to the largest, and how often each n of the span occurs; then the
words of an ANS coder with these frequencies, behind their length in bytes. A span of 0 needs neither frequencies nor words.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from constriction import stream
from torch import Tensor

from muonwire.codec.pack.ans import PRECISION, fixed_point_model
from muonwire.codec.pack.fields import Ints, pack_words, unpack_words
from muonwire.codec.payload import Reader, varint
from muonwire.errors import PayloadError


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


def mean(counts: Ints, replicas: int, *, scale: float) -> Tensor:
    """s (2 n − R) / R in float32, to the bit what summing the replicas' ±s in any order and dividing by R gives.

    A scale in bfloat16 has eight bits, so that in float32 every sum of fewer than 2¹⁶ of them is exact.

    >>> mean(np.array([0, 1, 3]), 3, scale=0.5)
    tensor([-0.5000, -0.1667,  0.5000])
    """
    total = torch.from_numpy(2 * counts - replicas).to(torch.float32) * scale
    # A sum of zeros is +0, whatever their signs.
    return (total + 0.0) / replicas


def pack(counts: Ints, replicas: int) -> bytes:
    """The body of at least one count of positive signs.

    >>> pack(np.array([2, 2, 2]), 3).hex(" ")
    '03 02 00'
    """
    lowest = int(counts.min())
    frequencies = np.bincount(counts - lowest)
    body = varint(replicas) + varint(lowest) + varint(len(frequencies) - 1)
    if len(frequencies) == 1:
        return body
    body += b"".join(varint(int(f)) for f in frequencies)
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(
        (counts - lowest).astype(np.int32), fixed_point_model(frequencies.astype(np.float64))
    )
    return body + pack_words(coder.get_compressed())


def unpack(body: bytes, count: int, *, largest: int) -> tuple[Ints, int]:
    """The counts, and the number of replicas.

    Args:
        body: bytes from outside.
        count: how many counts, at least one.
        largest: most replicas that may have sent.

    Raises:
        PayloadError: it is no body of so many counts.
    """
    reader = Reader(body, 0)
    replicas, lowest, span = (reader.varint(what) for what in ("replicas", "least sum", "span of sums"))
    if not 1 <= replicas <= largest or lowest + span > replicas:
        raise PayloadError(
            f"payload: sums of {replicas} signs from {lowest} to {lowest + span}; at most {largest} replicas have sent, each one"
        )
    if not span:
        if reader.left:
            raise PayloadError(f"payload: {reader.left} bytes follow its sums")
        return np.full(count, lowest, dtype=np.int64), replicas
    frequencies = [reader.varint(f"frequency of sum {lowest + i}") for i in range(span + 1)]
    if sum(frequencies) != count or not frequencies[0] or not frequencies[-1]:
        raise PayloadError(
            f"payload: frequencies {frequencies[:8]} ... are not those of {count} sums from {lowest} to {lowest + span}"
        )
    words, read = unpack_words(body[reader.position :])
    if read != reader.left:
        raise PayloadError(f"payload: {reader.left - read} bytes follow its coded words")
    coder = stream.stack.AnsCoder(words)
    symbols = coder.decode(fixed_point_model(np.array(frequencies, dtype=np.float64)), count)
    if not coder.is_empty():
        raise PayloadError(f"payload: {len(words)} coded words hold more than {count} sums")
    return symbols.astype(np.int64) + lowest, replicas


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
    # Nearly all lie within four standard deviations, √R / 2 each, of the middle.
    symbols = min(replicas + 1, 4 * math.sqrt(replicas) + 1)
    table = symbols * len(varint(max(1, int(count / symbols))))
    words = (count * entropy_bits(replicas) + PRECISION / 2) / 8
    return round(3 + table + words + len(varint(int(words))))
