"""The format of a part: what a replica sends to the owner of a part of the model, and what the owner sends back.

Both ends know the codec and the pieces that the part is made of, so a message names neither; its checksum covers both. All integers
little-endian; a varint is LEB128 in its shortest form (``payload.py``).

    version   u8      1; 0 says that the owner refuses what it was sent, and a text in UTF-8 follows that says why
    checksum  u32     CRC-32 of the codec's textual form, the pieces' shapes, and everything that follows
    lengths   varint  of each body
    bodies    one after the other

A part without pieces is an empty message.
"""

import struct
import zlib
from collections.abc import Sequence

from muonwire.codec.part import Shape
from muonwire.codec.payload import Reader, varint
from muonwire.errors import PayloadError

VERSION, REFUSAL = 1, 0
_HEAD = struct.Struct("<BI")
LARGEST_REFUSAL_BYTES = 1000


def _checksum(codec_text: str, shapes: Sequence[Shape], rest: bytes) -> int:
    place = f"{codec_text} {[tuple(shape) for shape in shapes]}"
    return zlib.crc32(rest, zlib.crc32(place.encode()))


def pack(codec_text: str, shapes: Sequence[Shape], bodies: Sequence[bytes]) -> bytes:
    """One message out of the pieces' bodies.

    >>> pack("float32", [(1,)], [bytes(4)]).hex(" ")
    '01 81 b7 94 5e 04 00 00 00 00'

    Args:
        codec_text: what wrote the bodies, and what for.
        shapes: of the pieces.
        bodies: one a piece, or one for all.
    """
    if not shapes:
        return b""
    rest = b"".join((*(varint(len(body)) for body in bodies), *bodies))
    return _HEAD.pack(VERSION, _checksum(codec_text, shapes, rest)) + rest


def num_bytes(lengths: Sequence[int]) -> int:
    """The length of what ``pack`` gives, from those of the bodies.

    >>> num_bytes([4]), num_bytes([])
    (10, 0)
    """
    return _HEAD.size + sum(len(varint(n)) + n for n in lengths) if lengths else 0


def refuse(why: str) -> bytes:
    """The message of an owner that cannot average what it was sent; ``unpack`` of it raises ``why`` on all replicas."""
    # Cut by characters of which each takes at most four bytes.
    return bytes([REFUSAL]) + why[: LARGEST_REFUSAL_BYTES // 4].encode()


def unpack(
    message: bytes, *, codec_text: str, shapes: Sequence[Shape], bodies: int | None = None
) -> list[bytes]:
    """Check a message and take it apart; nothing larger than the message itself is allocated.

    Args:
        message: bytes from outside.
        codec_text: what must have written it.
        shapes: of the pieces that it must hold.
        bodies: how many they have; default: one each.

    Raises:
        PayloadError: says what is wrong, or why an owner refuses.
    """
    if message[:1] == bytes([REFUSAL]):
        why = message[1 : LARGEST_REFUSAL_BYTES + 1].decode(errors="backslashreplace")
        raise PayloadError(f"refuses what it was sent: {why}")
    if not shapes:
        if message:
            raise PayloadError(f"payload: {len(message)} bytes for a part without pieces")
        return []
    if len(message) < _HEAD.size:
        raise PayloadError(f"payload: {len(message)} bytes are fewer than the {_HEAD.size} before a part")
    version, checksum = _HEAD.unpack_from(message)
    if version != VERSION:
        raise PayloadError(
            f"payload: a part of version {version}, this reader knows {VERSION}: update the older side"
        )
    if _checksum(codec_text, shapes, message[_HEAD.size :]) != checksum:
        raise PayloadError(
            f"payload: checksum {checksum:#010x} is not that of its content and of {len(shapes)} pieces by {codec_text!r}: damaged "
            "on the way, or written for another codec or other pieces"
        )
    reader = Reader(message, _HEAD.size)
    lengths = [reader.varint(f"length {i}") for i in range(len(shapes) if bodies is None else bodies)]
    found = [reader.take(length, f"body {i}") for i, length in enumerate(lengths)]
    if reader.left:
        raise PayloadError(f"payload: {reader.left} bytes follow its last piece")
    return found
