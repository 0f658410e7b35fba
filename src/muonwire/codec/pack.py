"""Bits: fixed-width fields, and Rice codes for the gaps between sorted positions.

A Rice code with parameter b writes a gap g as g >> b ones-terminated zeros (unary) and the b low bits of g. For entries that
are selected independently with probability p the gaps are geometric and the best b costs at most a few hundredths of a bit
a gap over their entropy.
"""

import numpy as np
import numpy.typing as npt

from muonwire.errors import PayloadError

Ints = npt.NDArray[np.int64]
LARGEST_RICE_BITS = 31


def pack_fields(values: Ints, width: int) -> bytes:
    """Pack the ``width`` low bits of each value, low bit first."""
    if width == 0 or values.size == 0:
        return b""
    bits = (values[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def unpack_fields(data: bytes, count: int, width: int) -> Ints:
    """The inverse of pack_fields for ``count`` values."""
    if width == 0 or count == 0:
        return np.zeros(count, dtype=np.int64)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * width, bitorder="little")
    return bits.reshape(count, width).astype(np.int64) @ (np.int64(1) << np.arange(width, dtype=np.int64))


def _rice_bits(gaps: Ints) -> int:
    """The parameter b that costs the fewest bits: Σ (g >> b) + (b + 1) a gap."""
    start = max(int(np.log2(max(gaps.mean(), 1.0))) - 1, 0)
    return min(range(start, start + 3), key=lambda b: int((gaps >> b).sum()) + gaps.size * b)


def encode_positions(positions: Ints) -> bytes:
    """Sorted distinct positions as Rice codes of the gaps: b (u8), the low bits of all gaps, their unary parts."""
    if positions.size == 0:
        return b""
    gaps = np.diff(positions, prepend=-1) - 1
    b = _rice_bits(gaps)
    quotients = gaps >> b
    unary = np.zeros(int(quotients.sum()) + gaps.size, dtype=np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 1
    return bytes((b,)) + pack_fields(gaps, b) + np.packbits(unary, bitorder="little").tobytes()


def decode_positions(data: bytes, count: int, limit: int) -> tuple[Ints, int]:
    """Read ``count`` positions below ``limit``; returns them and the number of bytes read.

    Raises:
        PayloadError: the bytes are cut off, or lead to a position at or above ``limit``.
    """
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
        np.frombuffer(data[1 + fields_bytes : 1 + fields_bytes + longest], dtype=np.uint8), bitorder="little"
    )
    ends = np.flatnonzero(unary)[:count]
    if ends.size < count:
        raise PayloadError(f"payload: {ends.size} of {count} positions, then its bytes end")
    quotients = np.diff(ends, prepend=-1) - 1
    positions = np.cumsum((quotients << b) + low + 1) - 1
    if positions[-1] >= limit:
        raise PayloadError(f"payload: position {positions[-1]} in a tensor of {limit} elements")
    return positions, 1 + fields_bytes + (int(ends[-1]) + 8) // 8


def estimate_positions_bytes(count: int, limit: int) -> int:
    """Expected bytes of encode_positions for ``count`` positions chosen uniformly out of ``limit``."""
    if count == 0:
        return 0
    miss = 1 - count / limit
    best = min(b + 1 + (miss ** (1 << b)) / (1 - miss ** (1 << b)) for b in range(LARGEST_RICE_BITS))
    return 1 + round(count * best / 8)
