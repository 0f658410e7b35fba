"""IDX files: the format of MNIST, Fashion-MNIST and data sets like them."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muonwire.errors import UsageError

UNSIGNED_BYTES = 0x08


def read_idx(path: Path) -> Tensor:
    """The bytes of an IDX file in their shape, uint8; compressed by gzip or not.

    A file is two zero bytes, the kind of its values, the number of dimensions, each dimension as four bytes with the highest
    first, then the values.

    Args:
        path: of the file.

    Raises:
        UsageError: the file cannot be read, is not IDX, holds other values than unsigned bytes, or its length is not the
            one in its header.

    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"idx: {path} cannot be read ({error}); give an IDX file, compressed by gzip or not"
        ) from error
    if len(data) < 4 or data[:3] != bytes((0, 0, UNSIGNED_BYTES)) or len(data) < 4 + 4 * data[3]:
        raise UsageError(
            f"idx: {path} does not begin as an IDX file of unsigned bytes does; give one such as MNIST's"
        )
    start = 4 + 4 * data[3]
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if math.prod(shape) != len(data) - start:
        raise UsageError(
            f"idx: {path} holds {len(data) - start} values, but its header gives the shape {shape}; the file is cut or damaged"
        )
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy())
