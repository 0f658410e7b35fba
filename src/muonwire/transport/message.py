"""What travels between two replicas that share a secret: a message under a tag, read without trusting it.

Little-endian: magic "MS", version u8, flags u8, length of the content u32, run u32 (a checksum of its name), epoch u64, sender
u16, receiver u16, number u64, offset u64, left u32, acknowledged u64; then 16 bytes of tag over all of that and the content; then
the content. ``offset`` is where the content stands in the sender's stream, ``left`` how much of the stream there is beyond it, and
``acknowledged`` how much of the receiver's own stream has come.
"""

import enum
import struct
from typing import NamedTuple

from muonwire.transport.secret import TAG_BYTES, Secret

FIELDS = struct.Struct("<2sBBIIQHHQQIQ")
MAGIC = b"MS"
VERSION = 1
START_BYTES = FIELDS.size + TAG_BYTES
# The longest message, and so the size of every buffer that waits for one; and what of it is content.
LARGEST_BYTES = 1 << 20
CONTENT_BYTES = LARGEST_BYTES - START_BYTES
LARGEST_LEFT = (1 << 32) - 1


class Mark(enum.IntFlag):
    """What a message says besides its content."""

    NONE = 0
    HELLO = 1  # the content is two nonces: the sender's, and the receiver's as far as the sender knows it
    AGAIN = 2  # send the stream again from what is acknowledged
    ANSWER = 4  # this message answers one that said AGAIN
    BYE = 8  # the stream ends where this message ends


class Refusal(enum.Enum):
    """Why a message was not accepted."""

    MALFORMED = "malformed"
    FOREIGN = "of another run, epoch, sender or receiver"
    ALTERED = "altered or forged"
    REPLAYED = "replayed or reordered"


class Place(NamedTuple):
    """Between whom messages travel, and when: everything that a message of this link must name."""

    run: int
    epoch: int
    sender: int
    receiver: int


class Message(NamedTuple):
    """One message, without its tag."""

    marks: Mark
    number: int
    offset: int
    left: int
    acknowledged: int
    content: bytes | memoryview = b""

    @property
    def end(self) -> int:
        """Where the sender's stream ended when the message was made."""
        return self.offset + len(self.content) + self.left

    def seal(self, place: Place, secret: Secret) -> bytearray:
        """The bytes on the wire."""
        fields = FIELDS.pack(
            MAGIC,
            VERSION,
            int(self.marks),
            len(self.content),
            place.run,
            place.epoch,
            place.sender,
            place.receiver,
            self.number,
            self.offset,
            min(self.left, LARGEST_LEFT),
            self.acknowledged,
        )
        made = bytearray(fields)
        made += secret.tag([fields, self.content])
        made += self.content
        return made


class Received(NamedTuple):
    """A message whose form is right, and whose tag has not been looked at."""

    message: Message
    fields: bytes
    tag: bytes

    def comes_from(self, secret: Secret) -> bool:
        """Whether a holder of the secret made it."""
        return secret.verifies(self.tag, [self.fields, self.message.content])


def read_message(buffer: memoryview, place: Place) -> Received | Refusal:
    """The message at the start of a buffer, in which its content stays, or why it is none of this link."""
    magic, version, marks, length, run, epoch, sender, receiver, number, offset, left, acknowledged = (
        FIELDS.unpack_from(buffer)
    )
    if magic != MAGIC or version != VERSION or marks > 15 or length > CONTENT_BYTES:
        return Refusal.MALFORMED
    if (run, epoch, sender, receiver) != place:
        return Refusal.FOREIGN
    content = buffer[START_BYTES : START_BYTES + length]
    return Received(
        Message(Mark(marks), number, offset, left, acknowledged, content),
        bytes(buffer[: FIELDS.size]),
        bytes(buffer[FIELDS.size : START_BYTES]),
    )
