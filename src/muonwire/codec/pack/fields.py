"""Fields of a fixed number of bits."""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


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
