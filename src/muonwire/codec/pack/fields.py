"""Fields of a fixed number of bits, and lengths."""

import numpy as np
import numpy.typing as npt

from muonwire.codec.payload import varint
from muonwire.errors import PayloadError

Ints = npt.NDArray[np.int64]


def pack_fields(values: Ints, width: int) -> bytes:
    """Pack the ``width`` low bits of each value, low bit first."""
    if width == 0 or values.size == 0:
        return b""
    octets = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(octets[:, : (width + 7) // 8], axis=1, count=width, bitorder="little")
    return np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def unpack_fields(data: bytes, count: int, width: int) -> Ints:
    """The inverse of pack_fields for ``count`` values."""
    octets = np.zeros((count, 8), dtype=np.uint8)
    if width and count:
        bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * width, bitorder="little")
        octets[:, : (width + 7) // 8] = np.packbits(bits.reshape(count, width), axis=1, bitorder="little")
    return octets.view("<i8").reshape(-1).astype(np.int64, copy=False)


def _digits_a_field(count: int, base: int) -> int:
    """How many digits share a field of at most 63 bits, where ``count`` of them are spread evenly over the fewest fields."""
    most, choices = 1, base * base
    while most < count and choices <= 1 << 63:
        most, choices = most + 1, choices * base
    return -(-count // -(-count // most))


def digits_bytes(count: int, base: int) -> int:
    """The length of what pack_digits gives."""
    if count == 0:
        return 0
    size = _digits_a_field(count, base)
    return (-(-count // size) * int(base**size - 1).bit_length() + 7) // 8


def pack_digits(digits: Ints, base: int) -> bytes:
    """Pack digits below ``base`` (at most 2^31) at hardly more than log2 base bits each: many of them make one field."""
    if digits.size == 0:
        return b""
    size = _digits_a_field(digits.size, base)
    rows = np.concatenate([digits, np.zeros(-digits.size % size, dtype=np.int64)]).reshape(-1, size)
    return pack_fields(rows @ (base ** np.arange(size, dtype=np.int64)), (base**size - 1).bit_length())


def unpack_digits(data: bytes, count: int, base: int) -> Ints:
    """The inverse of pack_digits for ``count`` digits."""
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    size = _digits_a_field(count, base)
    fields = unpack_fields(data, -(-count // size), (base**size - 1).bit_length())
    digits = np.empty((fields.size, size), dtype=np.int64)
    for i in range(size):
        fields, digits[:, i] = np.divmod(fields, base)
    return digits.reshape(-1)[:count]


def pack_words(words: npt.NDArray[np.uint32]) -> bytes:
    """Words behind their length in bytes (LEB128), without the zero bytes at their end."""
    data = words.astype("<u4").tobytes().rstrip(b"\0")
    return varint(len(data)) + data


def unpack_words(data: bytes) -> tuple[npt.NDArray[np.uint32], int]:
    """The inverse of pack_words, and the number of bytes read.

    Raises:
        PayloadError: ``data`` is shorter than its length says, or has a zero byte at its end.
    """
    length = read = 0
    while read < len(data) and read < 5:
        length |= (data[read] & 0x7F) << (7 * read)
        read += 1
        if data[read - 1] < 0x80:
            break
    else:
        raise PayloadError(f"payload: no length of coded words in its {len(data)} bytes")
    content = data[read : read + length]
    if len(content) != length or content[-1:] == b"\0":
        raise PayloadError(
            f"payload: {length} bytes of coded words are announced, {len(data) - read} follow, and the last may not be 0"
        )
    words = np.frombuffer(content + bytes(-length % 4), dtype="<u4").astype(np.uint32)
    return words, read + length
