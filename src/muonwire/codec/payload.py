"""The payload format: one or many encoded tensors in one message. docs/payload.md describes it byte by byte.

All integers little-endian; a varint is LEB128 (seven bits a byte, low bits first) in its shortest form.

    magic        2 bytes   "MW"
    version      u8        2
    checksum     u32       CRC-32 of everything that follows
    codec        varint length, then the codec's textual form in UTF-8
    num_tensors  varint
    per tensor:  dtype u8, ndim u8, ndim varints of shape, varint length of the body
    bodies       one after the other, in the same order

A payload has one form: what ``unpack`` accepts, ``pack`` writes again byte for byte.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from muonwire.codec.part import Shape
from muonwire.errors import PayloadError, UsageError

MAGIC = b"MW"
# 1 had Rice codes where a codec names no packer.
VERSION = 2
_HEAD = struct.Struct("<2sBI")
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_NDIM = 8
LARGEST_CODEC_BYTES = 1024
LARGEST_NUM_TENSORS = 1 << 17
# Elements of all tensors together: 4 GB of float32. A reader that knows what it expects gives a smaller limit, or the shapes.
LARGEST_NUMEL = 1 << 30
# dtype, ndim, and a one-byte length of the body of a scalar.
_SMALLEST_TENSOR_BYTES = 3
_QUOTED_CHARACTERS = 80


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a payload."""

    shape: Shape
    dtype: torch.dtype
    body: bytes


def varint(value: int) -> bytes:
    """LEB128 in its shortest form."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _table(codec_text: str, tensors: Sequence[tuple[Shape, torch.dtype, int]]) -> bytes:
    text = codec_text.encode()
    if len(text) > LARGEST_CODEC_BYTES or len(tensors) > LARGEST_NUM_TENSORS:
        raise UsageError(
            f"payload: {len(tensors)} tensors and {len(text)} bytes of codec; a payload holds at most "
            f"{LARGEST_NUM_TENSORS} and {LARGEST_CODEC_BYTES}"
        )
    table = bytearray(varint(len(text)) + text + varint(len(tensors)))
    for shape, dtype, body_bytes in tensors:
        if dtype not in _DTYPE_CODES or len(shape) > LARGEST_NDIM:
            raise UsageError(
                f"payload: a tensor of {dtype} and {len(shape)} dimensions; allowed are "
                f"{', '.join(map(str, _DTYPE_CODES))} and at most {LARGEST_NDIM} dimensions"
            )
        table += bytes((_DTYPE_CODES[dtype], len(shape)))
        for size in (*shape, body_bytes):
            table += varint(size)
    return bytes(table)


def pack(codec_text: str, tensors: Sequence[tuple[Shape, torch.dtype, bytes]]) -> bytes:
    """One payload out of (shape, dtype, body) of each tensor.

    >>> pack("float32", [((), torch.float32, bytes(4))]).hex(" ")
    '4d 57 02 cd 4e 7f 1f 07 66 6c 6f 61 74 33 32 01 01 00 04 00 00 00 00'

    Raises:
        UsageError: a dtype that the format does not name, or more dimensions, tensors or codec text than it allows.
    """
    table = _table(codec_text, [(shape, dtype, len(body)) for shape, dtype, body in tensors])
    rest = b"".join((table, *(body for _, _, body in tensors)))
    return _HEAD.pack(MAGIC, VERSION, zlib.crc32(rest)) + rest


def num_bytes(codec_text: str, tensors: Sequence[tuple[Shape, torch.dtype, int]]) -> int:
    """Exactly the length of what ``pack`` gives, from (shape, dtype, bytes of the body) of each tensor.

    >>> num_bytes("float32", [((), torch.float32, 4)])
    23
    """
    return _HEAD.size + len(_table(codec_text, tensors)) + sum(body_bytes for _, _, body_bytes in tensors)


class Reader:
    """Reads bytes from outside off the front; what is not there is a PayloadError."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data = data
        self.position = position

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return len(self.data) - self.position

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; ``what`` names them in the error."""
        if count > self.left:
            raise PayloadError(f"payload: cut off in its {what}: {count} bytes wanted, {self.left} left")
        self.position += count
        return self.data[self.position - count : self.position]

    def varint(self, what: str) -> int:
        """The next varint, in its shortest form."""
        value = 0
        for shift in range(0, 63, 7):
            (byte,) = self.take(1, what)
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift > 0:
                    raise PayloadError(
                        f"payload: the varint of its {what} is longer than its value {value} needs"
                    )
                return value
        raise PayloadError(f"payload: the varint of its {what} is longer than nine bytes")

    def codec_text(self) -> str:
        """The next text behind its length."""
        length = self.varint("codec length")
        if length > LARGEST_CODEC_BYTES:
            raise PayloadError(
                f"payload: a codec of {length} bytes; at most {LARGEST_CODEC_BYTES} are allowed"
            )
        raw = self.take(length, "codec")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise PayloadError(f"payload: its codec {_quoted(raw)} is not UTF-8") from error


def _quoted(text: str | bytes) -> str:
    """For messages: what comes from outside, escaped and not too long."""
    if len(text) <= _QUOTED_CHARACTERS:
        return repr(text)
    return f"{text[:_QUOTED_CHARACTERS]!r}... ({len(text)} in all)"


def _check_head(payload: bytes) -> None:
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


def _read_table(
    reader: Reader, count: int, shapes: Sequence[Shape] | None, largest_numel: int
) -> list[tuple[Shape, torch.dtype, int]]:
    table = []
    total = 0
    for i in range(count):
        dtype_code, ndim = reader.take(2, f"tensor {i}")
        if dtype_code not in DTYPES or ndim > LARGEST_NDIM:
            raise PayloadError(
                f"payload: tensor {i} has dtype code {dtype_code} and {ndim} dimensions; allowed are codes "
                f"{', '.join(map(str, DTYPES))} and at most {LARGEST_NDIM} dimensions"
            )
        shape = tuple(reader.varint(f"shape of tensor {i}") for _ in range(ndim))
        if shapes is not None:
            if shape != tuple(shapes[i]):
                raise PayloadError(f"payload: tensor {i} has shape {shape}, {tuple(shapes[i])} is expected")
        else:
            # A dimension of zero must not hide others that no tensor can have.
            total += math.prod(max(size, 1) for size in shape)
            if total > largest_numel:
                raise PayloadError(
                    f"payload: with tensor {i} of shape {shape} it is over {largest_numel} elements; a reader that "
                    "expects more gives a larger largest_numel, or the shapes"
                )
        table.append((shape, DTYPES[dtype_code], reader.varint(f"length of tensor {i}")))
    return table


def unpack(
    payload: bytes | bytearray | memoryview,
    *,
    codec_text: str | None = None,
    num_tensors: int | None = None,
    shapes: Sequence[Shape] | None = None,
    largest_numel: int = LARGEST_NUMEL,
) -> list[Entry]:
    """Check a payload and take it apart; nothing larger than the payload itself is allocated.

    What decoding the entries allocates is bounded by the elements that are let through here: by ``shapes`` where they are
    given, by ``largest_numel`` where not.

    Args:
        payload: bytes from outside.
        codec_text: the codec that must have written it. Default: any.
        num_tensors: how many tensors it must hold. Default: any number up to LARGEST_NUM_TENSORS.
        shapes: the shapes it must hold, in order. Default: any.
        largest_numel: most elements of all tensors together, where ``shapes`` does not say; one of no elements counts as
            the product of its other dimensions. Default: 2³⁰.

    Raises:
        PayloadError: says what is wrong, what was found and what is expected.
    """
    payload = bytes(payload)
    _check_head(payload)
    reader = Reader(payload, _HEAD.size)
    written_by = reader.codec_text()
    if codec_text is not None and written_by != codec_text:
        raise PayloadError(f"payload: written by codec {_quoted(written_by)}, {codec_text!r} is expected")
    count = reader.varint("number of tensors")
    if shapes is not None:
        num_tensors = len(shapes)
    if num_tensors is not None and count != num_tensors:
        raise PayloadError(f"payload: holds {count} tensors, {num_tensors} are expected")
    if count > min(LARGEST_NUM_TENSORS, reader.left // _SMALLEST_TENSOR_BYTES):
        raise PayloadError(
            f"payload: announces {count} tensors with {reader.left} bytes left; each takes at least "
            f"{_SMALLEST_TENSOR_BYTES}, and {LARGEST_NUM_TENSORS} are allowed"
        )
    table = _read_table(reader, count, shapes, largest_numel)
    entries = [
        Entry(shape=shape, dtype=dtype, body=reader.take(length, f"body of tensor {i}"))
        for i, (shape, dtype, length) in enumerate(table)
    ]
    if reader.left:
        raise PayloadError(f"payload: {reader.left} bytes follow its last tensor")
    return entries
