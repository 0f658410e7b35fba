"""The payload format: one or many encoded tensors in one message.

All integers little-endian; a varint is LEB128 (seven bits a byte, low bits first).

    magic        2 bytes   "MW"
    version      u8        1
    checksum     u32       CRC-32 of everything that follows
    codec        varint length, then the codec's textual form in UTF-8
    num_tensors  varint
    per tensor:  dtype u8, ndim u8, ndim varints of shape, varint length of the body
    bodies       one after the other, in the same order
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from muonwire.errors import PayloadError

MAGIC = b"MW"
VERSION = 1
_HEAD = struct.Struct("<2sBI")
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_NDIM = 8
LARGEST_NUMEL = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    body: bytes


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _table(codec_text: str, tensors: Sequence[tuple[tuple[int, ...], torch.dtype, int]]) -> bytes:
    text = codec_text.encode()
    table = bytearray(_varint(len(text)) + text + _varint(len(tensors)))
    for shape, dtype, body_bytes in tensors:
        table += bytes((_DTYPE_CODES[dtype], len(shape)))
        for size in (*shape, body_bytes):
            table += _varint(size)
    return bytes(table)


def pack(codec_text: str, tensors: Sequence[tuple[tuple[int, ...], torch.dtype, bytes]]) -> bytes:
    """One payload out of (shape, dtype, body) of each tensor."""
    table = _table(codec_text, [(shape, dtype, len(body)) for shape, dtype, body in tensors])
    rest = b"".join((table, *(body for _, _, body in tensors)))
    return _HEAD.pack(MAGIC, VERSION, zlib.crc32(rest)) + rest


def header_bytes(codec_text: str, tensors: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Bytes of a payload that are not bodies, for bodies of up to 127 bytes (one byte more for each further 7 bits)."""
    return _HEAD.size + len(_table(codec_text, [(shape, dtype, 0) for shape, dtype in tensors]))


class _Reader:
    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.data) - self.position:
            raise PayloadError(
                f"payload: cut off in its {what}: {count} bytes wanted, {len(self.data) - self.position} left"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self, what: str) -> int:
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1, what)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise PayloadError(f"payload: the varint of its {what} is longer than nine bytes")


def unpack(
    payload: bytes,
    *,
    codec_text: str | None = None,
    num_tensors: int | None = None,
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[Entry]:
    """Check a payload and take it apart; nothing larger than the payload itself is allocated.

    Args:
        payload: bytes from outside.
        codec_text: the codec that must have written it. Default: any.
        num_tensors: how many tensors it must hold. Default: any number.
        shapes: the shapes it must hold, in order. Default: any.

    Raises:
        PayloadError: says what is wrong, what was found and what is expected.
    """
    if len(payload) < _HEAD.size:
        raise PayloadError(f"payload: {len(payload)} bytes are fewer than the header's {_HEAD.size}")
    magic, version, checksum = _HEAD.unpack_from(payload)
    if magic != MAGIC:
        raise PayloadError(f"payload: begins with {magic!r}, not {MAGIC!r}: not a payload of muonwire")
    if version != VERSION:
        raise PayloadError(f"payload: version {version}, this reader knows {VERSION}: update the older side")
    if zlib.crc32(memoryview(payload)[_HEAD.size :]) != checksum:
        raise PayloadError(
            f"payload: checksum {checksum:#010x} does not match its content: damaged on the way"
        )
    reader = _Reader(payload, _HEAD.size)
    written_by = reader.take(reader.varint("codec length"), "codec").decode(errors="replace")
    if codec_text is not None and written_by != codec_text:
        raise PayloadError(f"payload: written by codec {written_by!r}, {codec_text!r} is expected")
    count = reader.varint("number of tensors")
    if shapes is not None:
        num_tensors = len(shapes)
    if num_tensors is not None and count != num_tensors:
        raise PayloadError(f"payload: holds {count} tensors, {num_tensors} are expected")
    headers = []
    for i in range(count):
        dtype_code, ndim = reader.take(2, f"tensor {i}")
        if dtype_code not in DTYPES or ndim > LARGEST_NDIM:
            raise PayloadError(f"payload: tensor {i} has dtype code {dtype_code} and {ndim} dimensions")
        shape = tuple(reader.varint(f"shape of tensor {i}") for _ in range(ndim))
        if math.prod(shape) > LARGEST_NUMEL:
            raise PayloadError(f"payload: tensor {i} of shape {shape} is over {LARGEST_NUMEL} elements")
        if shapes is not None and shape != tuple(shapes[i]):
            raise PayloadError(f"payload: tensor {i} has shape {shape}, {tuple(shapes[i])} is expected")
        headers.append((shape, DTYPES[dtype_code], reader.varint(f"length of tensor {i}")))
    entries = [
        Entry(shape=shape, dtype=dtype, body=reader.take(length, f"body of tensor {i}"))
        for i, (shape, dtype, length) in enumerate(headers)
    ]
    if reader.position != len(payload):
        raise PayloadError(f"payload: {len(payload) - reader.position} bytes follow its last tensor")
    return entries
