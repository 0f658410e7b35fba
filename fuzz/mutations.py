"""Mutations of payloads, from a field's extreme value to noise; most carry a right checksum, so that they reach the decoders."""

import struct
import zlib
from dataclasses import dataclass, field, replace
from random import Random

from muonwire.codec import payload as payloads

EXTREME_BYTES = (0x00, 0x01, 0x7F, 0x80, 0xFF)
EXTREME_SIZES = (0, 1, 2, 3, 127, 128, 255, 256, 65_535, 2**31 - 1, 2**31, 2**32, 2**60, 2**63 - 1, 2**70)
LARGEST_INSERTION = 64


@dataclass(frozen=True, kw_only=True)
class Field:
    """One tensor as it stands in the bytes; ``length`` None is that of the body."""

    dtype_code: int
    shape: tuple[int, ...]
    body: bytes
    length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Message:
    """A payload taken apart, whose fields may contradict each other; ``count`` None is the number of tensors."""

    text: bytes
    tensors: tuple[Field, ...] = field(default=())
    count: int | None = None

    def rest(self) -> bytes:
        """What stands behind the checksum."""
        count = len(self.tensors) if self.count is None else self.count
        out = varint(len(self.text)) + self.text + varint(count)
        for t in self.tensors:
            length = len(t.body) if t.length is None else t.length
            sizes = b"".join(map(varint, (*t.shape, length)))
            out += bytes((t.dtype_code & 0xFF, len(t.shape) & 0xFF)) + sizes
        return out + b"".join(t.body for t in self.tensors)


def varint(value: int) -> bytes:
    """LEB128, of values past the format's limit too."""
    return payloads.varint(value)


def sealed(rest: bytes) -> bytes:
    """A payload whose checksum is right."""
    return struct.pack("<2sBI", payloads.MAGIC, payloads.VERSION, zlib.crc32(rest)) + rest


def mutate_bytes(data: bytes, random: Random, *, other: bytes) -> bytes:
    """One change of some bytes; ``other`` is what a splice continues with."""
    out = bytearray(data)
    kind = random.randrange(9)
    at = random.randrange(len(out)) if out else 0
    if kind <= 1 and out:
        out[at] ^= 1 << random.randrange(8)
    elif kind == 2 and out:
        out[at] = random.choice(EXTREME_BYTES)
    elif kind == 3:
        out[at:at] = random.randbytes(random.randint(1, LARGEST_INSERTION))
    elif kind == 4:
        del out[at : at + random.randint(1, 8)]
    elif kind == 5:
        out = out[:at]
    elif kind == 6:
        out = out[:at] + other[random.randrange(len(other) + 1) :]
    elif kind == 7:
        end = min(len(out), at + random.randint(1, 16))
        out[at:end] = bytes((random.choice(EXTREME_BYTES),)) * (end - at)
    else:
        out[at:at] = out[at : at + random.randint(1, 16)]
    return bytes(out)


def mutate_table(message: Message, random: Random, *, other: Message) -> Message:
    """One change of the table: order, number, shapes, lengths, dtypes, the codec's text."""
    tensors = list(message.tensors)
    kind = random.randrange(10)
    if kind == 0:
        return replace(message, count=random.choice((*EXTREME_SIZES, len(tensors) + 1)))
    if kind == 1:
        return replace(message, text=mutate_bytes(message.text, random, other=other.text))
    if not tensors:
        return replace(message, tensors=other.tensors)
    i = random.randrange(len(tensors))
    chosen = tensors[i]
    if kind == 2:
        random.shuffle(tensors)
    elif kind == 3:
        tensors.insert(random.randrange(len(tensors) + 1), chosen)
    elif kind == 4:
        del tensors[i]
    elif kind == 5 and other.tensors:
        tensors[i] = replace(chosen, body=random.choice(other.tensors).body)
    elif kind == 6:
        tensors[i] = replace(chosen, length=random.choice((*EXTREME_SIZES, len(chosen.body) + 1)))
    elif kind == 7:
        tensors[i] = replace(chosen, dtype_code=random.choice((*payloads.DTYPES, 0, 5, 255)))
    else:
        tensors[i] = replace(chosen, shape=_mutated_shape(chosen.shape, random))
    return replace(message, tensors=tuple(tensors))


def _mutated_shape(shape: tuple[int, ...], random: Random) -> tuple[int, ...]:
    sizes = list(shape)
    kind = random.randrange(5)
    if kind == 0 or not sizes:
        sizes.insert(random.randint(0, len(sizes)), random.choice((1, 1, 2, *EXTREME_SIZES)))
    elif kind == 1:
        del sizes[random.randrange(len(sizes))]
    elif kind == 2:
        sizes.reverse()
    else:
        i = random.randrange(len(sizes))
        near = (sizes[i] + 1, max(sizes[i] - 1, 0), 2 * sizes[i], random.randint(0, 200))
        sizes[i] = random.choice((*near, *near, *EXTREME_SIZES))
    return tuple(sizes)


def mutate(message: Message, random: Random, *, other: Message) -> tuple[Message | None, bytes]:
    """A payload made of ``message``, and the message behind it where there is one (for the corpus).

    Of 100: 70 change bodies, 20 the table, 7 the bytes of either under a right checksum, 2 under a wrong one, 1 is noise.
    """
    share = random.random()
    if share < 0.9:
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            if random.random() < 0.78 and message.tensors:
                i = random.randrange(len(message.tensors))
                chosen = message.tensors[i]
                donor = random.choice(other.tensors).body if other.tensors else b""
                body = mutate_bytes(chosen.body, random, other=donor)
                tensors = (*message.tensors[:i], replace(chosen, body=body), *message.tensors[i + 1 :])
                message = replace(message, tensors=tensors)
            else:
                message = mutate_table(message, random, other=other)
        return message, sealed(message.rest())
    if share < 0.97:
        return None, sealed(mutate_bytes(message.rest(), random, other=other.rest()))
    if share < 0.99:
        return None, mutate_bytes(sealed(message.rest()), random, other=sealed(other.rest()))
    noise = random.randbytes(random.randint(0, 200))
    return None, random.choice((noise, sealed(noise)))
