"""Codes of a few bits, packed: the layout of pack.fields.pack_fields, at the speed that whole tensors need."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from muonwire.codec import packing
from muonwire.codec.host import Field, octets, on_host

Codes = npt.NDArray[np.uint8]


def pack_codes(codes: Codes, width: int) -> bytes:
    """Pack codes below 2^width (width 1 to 8), low bit first.

    >>> pack_codes(np.array([1, 2, 3], dtype=np.uint8), 4).hex()
    '2103'
    """
    return _pack(codes, width).tobytes()


def _pack(codes: Codes, width: int) -> Codes:
    # Eight codes make ``width`` bytes.
    eights = np.zeros((-(-codes.size // 8), 8), dtype=np.uint8)
    eights.reshape(-1)[: codes.size] = codes
    if width in (1, 2, 4, 8):
        packed: Codes = eights.reshape(-1)
        for shift in (1, 2, 4):
            if shift >= width:
                packed = packed[0::2] | np.left_shift(packed[1::2], np.uint8(shift))
    else:
        words = np.zeros(len(eights), dtype="<u8")
        for i in range(8):
            words |= eights[:, i].astype("<u8") << np.uint64(width * i)
        packed = words.view(np.uint8).reshape(-1, 8)[:, :width]
    return packed.reshape(-1)[: (codes.size * width + 7) // 8]


def unpack_codes(data: bytes, count: int, width: int) -> Codes:
    """The inverse of pack_codes for ``count`` codes, from (count · width + 7) // 8 bytes."""
    packed: Codes = np.frombuffer(data, dtype=np.uint8)
    if width in (1, 2, 4, 8):
        for shift in (4, 2, 1):
            if shift >= width:
                halves = np.empty((packed.size, 2), dtype=np.uint8)
                np.bitwise_and(packed, (1 << shift) - 1, out=halves[:, 0])
                np.right_shift(packed, shift, out=halves[:, 1])
                packed = halves.reshape(-1)
        return packed[:count].copy()
    words = np.zeros((-(-count // 8), 8), dtype=np.uint8)
    used = np.zeros(len(words) * width, dtype=np.uint8)
    used[: len(data)] = packed
    words[:, :width] = used.reshape(-1, width)
    wide = words.view("<u8").reshape(-1)
    codes = np.empty_like(words)
    for i in range(8):
        codes[:, i] = wide >> np.uint64(width * i) & np.uint64((1 << width) - 1)
    return codes.reshape(-1)[:count]


def packed(codes: Tensor, width: int) -> Field:
    """``pack_codes`` where the codes (1-D, uint8) are: by numpy on the CPU, else by the device."""
    if on_host(codes.device):
        return Field(torch.from_numpy(_pack(codes.numpy(), width)))
    return Field(packing.pack(codes, width))


def unpacked(data: bytes, count: int, width: int, device: torch.device) -> Tensor:
    """``unpack_codes`` onto ``device``, to which the packed bytes alone go."""
    if on_host(device):
        return torch.from_numpy(unpack_codes(data, count, width))
    return packing.unpack(octets(data, device), count, width)
