"""Codes of a few bits, packed: the layout of pack.fields.pack_fields, at the speed that whole tensors need."""

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]


def pack_codes(codes: Codes, width: int) -> bytes:
    """Pack the ``width`` (1 to 8) low bits of each code, low bit first.

    >>> pack_codes(np.array([1, 2, 3], dtype=np.uint8), 4).hex()
    '2103'
    """
    if width == 8:
        return codes.tobytes()
    # Eight codes make ``width`` bytes, which are the low ones of a 64-bit word.
    eights = np.zeros((-(-codes.size // 8), 8), dtype=np.uint8)
    eights.reshape(-1)[: codes.size] = codes
    words = np.zeros(len(eights), dtype="<u8")
    for i in range(8):
        words |= eights[:, i].astype("<u8") << np.uint64(width * i)
    used = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :width])
    return used.tobytes()[: (codes.size * width + 7) // 8]


def unpack_codes(data: bytes, count: int, width: int) -> Codes:
    """The inverse of pack_codes for ``count`` codes, from (count · width + 7) // 8 bytes."""
    if width == 8:
        return np.frombuffer(data, dtype=np.uint8).copy()
    num_words = -(-count // 8)
    used = np.zeros(num_words * width, dtype=np.uint8)
    used[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    words = np.zeros((num_words, 8), dtype=np.uint8)
    words[:, :width] = used.reshape(num_words, width)
    wide = words.view("<u8").reshape(-1)
    codes = np.empty((num_words, 8), dtype=np.uint8)
    for i in range(8):
        codes[:, i] = wide >> np.uint64(width * i) & np.uint64((1 << width) - 1)
    return codes.reshape(-1)[:count]
