"""One end of a stream between two replicas, over a channel that keeps order and may be tampered with.

Each end writes messages of any length into its stream, whose pieces travel under tags (``message.py``). What a piece says the
other end has received lets this end forget it; a message that is not accepted is counted, and the stream asked for again from
where it was whole. Where nobody tampers, nothing is asked for, and a piece travels once.

Two ends begin with nonces: each says its own, and then the other's. The key of the tags follows from both, so that messages
of an earlier run with the same secret are as good as forged.
"""

import secrets
import struct
from collections import Counter, deque

from muonwire.errors import ExchangeError
from muonwire.transport.message import (
    CONTENT_BYTES,
    LARGEST_BYTES,
    START_BYTES,
    Mark,
    Message,
    Place,
    Received,
    Refusal,
    read_message,
)
from muonwire.transport.secret import Secret

# How many messages in a row may be refused: before the other end has shown that it holds the secret, and after.
MOST_REFUSED_BEFORE, MOST_REFUSED = 1_000, 100_000
_NONCE_BYTES = 16
_LENGTH = struct.Struct("<Q")


def sealed_bytes(num_bytes: int) -> int:
    """Bytes on the wire of ``num_bytes`` that are written at once: with their length, and 68 bytes for each piece of up to 1 MiB.

    >>> sealed_bytes(1000), sealed_bytes(0)
    (1076, 76)
    """
    stream = _LENGTH.size + num_bytes
    return stream + START_BYTES * -(-stream // CONTENT_BYTES)


class Stream:
    """One end. It does no sending itself: ``pieces`` and ``owed`` give the bytes to send, and ``receive`` takes what came.

    Args:
        secret: of all replicas of the run.
        run: name of the run, the same on both ends.
        epoch: number of this group of replicas, the same on both ends.
        rank: of this end.
        peer: rank of the other end.
    """

    def __init__(self, secret: Secret, *, run: str, epoch: int, rank: int, peer: int) -> None:
        base = secret.derive([run.encode(), b"\0", epoch.to_bytes(8, "little")])
        # A checksum: it names the run, and the tag is what proves it.
        self._run = int.from_bytes(base.tag([b"run"])[:4], "little")
        self._out = Place(self._run, epoch, rank, peer)
        self._in = Place(self._run, epoch, peer, rank)
        self._base = base
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._theirs = bytes(_NONCE_BYTES)
        self._key: Secret | None = None
        self._number = 0
        self._last_number = 0
        self._written = 0
        self._unacknowledged: deque[tuple[int, memoryview]] = deque()
        self._received = 0
        self._early: dict[int, bytes] = {}
        self._whole = bytearray()
        self._hole_at = -1
        self._asked = False
        self._owes = Mark.HELLO | Mark.AGAIN
        self._closing = Mark.NONE
        self._ended = False
        self._missed = False
        self._in_a_row = 0
        self.inbox: deque[bytearray] = deque()
        self.refused: Counter[Refusal] = Counter()
        self.peer = peer
        # What travels besides the pieces of the stream, each once.
        self.extra_sent_bytes = 0
        self.extra_received_bytes = 0

    @property
    def established(self) -> bool:
        """Whether the other end has shown that it holds the secret, in this epoch and now."""
        return self._key is not None

    @property
    def delivered(self) -> bool:
        """Whether the other end has all that was written."""
        return not self._unacknowledged

    @property
    def ended(self) -> bool:
        """Whether the other end has said that it leaves, and nothing of its stream is missing here."""
        return self._ended

    def pieces(self, *parts: bytes | memoryview) -> "list[Piece]":
        """Write a message, given in parts, into the stream: the pieces to send, in this order."""
        view = memoryview(b"".join([_LENGTH.pack(sum(map(len, parts))), *parts]))
        made = []
        for start in range(0, len(view), CONTENT_BYTES):
            content = view[start : start + CONTENT_BYTES]
            made.append(Piece(self._written + start, content))
        self._unacknowledged.extend((piece.offset, piece.content) for piece in made)
        self._written += len(view)
        return made

    def seal(self, piece: "Piece") -> bytearray:
        """The message that brings a piece."""
        return self._seal(self._closing, piece.offset, piece.content)

    def owed(self) -> bytearray | None:
        """The next message to send besides the stream: a greeting, a question, an answer or the end; none where nothing is due."""
        owes, self._owes = self._owes, Mark.NONE
        if not owes:
            return None
        if owes & Mark.HELLO or self._key is None:
            made = self._greet(owes)
        elif owes & Mark.ANSWER and self._unacknowledged:
            offset, content = self._unacknowledged[0]
            made = self._seal(self._closing | (owes & (Mark.ANSWER | Mark.AGAIN)), offset, content)
        else:
            made = self._seal(self._closing | owes, self._written, b"")
        self._asked = self._asked or bool(owes & Mark.AGAIN)
        self.extra_sent_bytes += len(made)
        return made

    def greet_again(self) -> None:
        """Let the next message be a greeting."""
        self._owes |= Mark.HELLO | Mark.AGAIN

    def close(self) -> None:
        """Let the next message say that this end has written all."""
        self._closing = Mark.BYE
        self._owes |= Mark.BYE

    def receive(self, buffer: memoryview) -> Refusal | None:
        """Take the message at the start of a buffer of ``LARGEST_BYTES``; the reason where it is not accepted.

        Raises:
            ExchangeError: too many in a row were not.
        """
        read = read_message(buffer, self._in)
        refusal = read if isinstance(read, Refusal) else self._take(read)
        if refusal is None:
            self._in_a_row = 0
            return None
        self.refused[refusal] += 1
        self._in_a_row += 1
        self.extra_received_bytes += _claimed_bytes(read)
        if self._in_a_row >= (MOST_REFUSED if self.established else MOST_REFUSED_BEFORE):
            raise self._flooded()
        self._missed = True
        # It may have been a genuine one that was altered on its way.
        if self.established:
            self._owes |= Mark.AGAIN
        else:
            self.greet_again()
        return refusal

    def _take(self, read: Received) -> Refusal | None:
        message = read.message
        if message.marks & Mark.HELLO:
            return self._meet(read)
        if self._key is None or not read.comes_from(self._key):
            return Refusal.ALTERED
        if message.number <= self._last_number:
            return Refusal.REPLAYED
        self._last_number = message.number
        while self._unacknowledged and self._unacknowledged[0][0] < message.acknowledged:
            self._unacknowledged.popleft()
        before = self._received
        self._place(message)
        if message.marks & Mark.ANSWER:
            if message.end <= self._received:
                self._asked = False
            elif self._received > before:
                # The answer brings one piece; what is behind it may be missing, too.
                self._owes |= Mark.AGAIN
        if message.marks & Mark.AGAIN:
            self._owes |= Mark.ANSWER | (Mark.AGAIN if self._asked else Mark.NONE)
        self._ended = bool(message.marks & Mark.BYE) and message.end <= self._received
        return None

    def _place(self, message: Message) -> None:
        """Put the content where it belongs in the other end's stream."""
        size = len(message.content)
        if message.offset > self._received:
            if size and message.offset not in self._early:
                self._early[message.offset] = bytes(message.content)
            else:
                self.extra_received_bytes += START_BYTES + size
            if self._hole_at != self._received:
                self._hole_at = self._received
                self._owes |= Mark.AGAIN
            return
        if not size or message.offset < self._received:
            self.extra_received_bytes += START_BYTES + size
            return
        self._whole += message.content
        self._received += size
        while self._received in self._early:
            content = self._early.pop(self._received)
            self._whole += content
            self._received += len(content)
        while len(self._whole) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._whole)
            if len(self._whole) < _LENGTH.size + length:
                break
            if len(self._whole) == _LENGTH.size + length:
                done, self._whole = self._whole, bytearray()
                del done[: _LENGTH.size]
            else:
                done = self._whole[_LENGTH.size : _LENGTH.size + length]
                del self._whole[: _LENGTH.size + length]
            self.inbox.append(done)

    def _meet(self, read: Received) -> Refusal | None:
        """Take a greeting."""
        message = read.message
        if len(message.content) != 2 * _NONCE_BYTES or not read.comes_from(self._base):
            return Refusal.ALTERED
        theirs, mine = bytes(message.content[:_NONCE_BYTES]), bytes(message.content[_NONCE_BYTES:])
        if self._key is None:
            self._theirs = theirs
            if mine == self._nonce:
                # Whoever knows this end's nonce is not heard from an earlier run.
                first, second = (mine, theirs) if self._out.sender < self._out.receiver else (theirs, mine)
                self._key = self._base.derive([first, second])
                self._last_number = message.number
                self._owes |= self._closing | (Mark.AGAIN if self._missed else Mark.NONE)
        elif theirs != self._theirs or message.number <= self._last_number:
            return Refusal.REPLAYED
        else:
            self._last_number = message.number
        self.extra_received_bytes += START_BYTES + len(message.content)
        if message.marks & Mark.AGAIN:
            self._owes |= Mark.HELLO if self.established else Mark.HELLO | Mark.AGAIN
        return None

    def _greet(self, owes: Mark) -> bytearray:
        if self.established:
            # The rest of what is owed goes under the key of both nonces.
            self._owes = owes & ~Mark.HELLO
            marks = Mark.HELLO
        else:
            marks = Mark.HELLO | Mark.AGAIN
        self._number += 1
        message = Message(marks, self._number, 0, 0, 0, self._nonce + self._theirs)
        return message.seal(self._out, self._base)

    def _seal(self, marks: Mark, offset: int, content: bytes | memoryview) -> bytearray:
        assert self._key is not None
        self._number += 1
        left = self._written - offset - len(content)
        return Message(marks, self._number, offset, left, self._received, content).seal(self._out, self._key)

    def mismatch(self) -> ExchangeError | None:
        """The error of two ends that do not share a secret; none where they do, or nothing was refused."""
        if self.established or not self.refused:
            return None
        return ExchangeError(
            f"{self._refusals()}, and none that is valid: give all replicas the same --secret-file, and the same run and epoch"
        )

    def _flooded(self) -> ExchangeError:
        return self.mismatch() or ExchangeError(
            f"{self._refusals()}: somebody on the way between the two alters or adds messages; join them by a tunnel "
            "(docs/wireguard.md)"
        )

    def _refusals(self) -> str:
        kinds = ", ".join(f"{count} {kind.value}" for kind, count in self.refused.items())
        return f"replica {self._in.receiver} refused {self._in_a_row} messages in a row from replica {self.peer} ({kinds})"


class Piece:
    """A piece of the stream, and where it stands."""

    __slots__ = ("content", "offset")

    def __init__(self, offset: int, content: memoryview) -> None:
        self.offset = offset
        self.content = content


def _claimed_bytes(read: Received | Refusal) -> int:
    """What a refused message seems to have had: of one that is none of this link only the start is known."""
    size = START_BYTES if isinstance(read, Refusal) else START_BYTES + len(read.message.content)
    return min(size, LARGEST_BYTES)
