"""One round of exchange: the requests of several groups in one message."""

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from muonwire.errors import PayloadError
from muonwire.transport.base import Transport

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a stage wants exchanged: ``tensors`` to average, or a ``payload`` to gather, never both."""

    tensors: Sequence[Tensor] | None = None
    payload: bytes | None = None

    def __post_init__(self) -> None:
        assert (self.tensors is None) != (self.payload is None)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a request: averaged tensors, or all replicas' payloads in rank order."""

    tensors: Sequence[Tensor] = ()
    payloads: Sequence[bytes] = ()


# The rounds of a stage: it yields requests, is sent replies, and returns the updates.
Rounds = Generator[Request, Reply, list[Tensor]]


def join(payloads: Sequence[bytes]) -> bytes:
    """One message out of several payloads, each behind its length (u32); a single payload goes as it is."""
    if len(payloads) == 1:
        return payloads[0]
    return b"".join(_LENGTH.pack(len(p)) + p for p in payloads)


def split(message: bytes, count: int) -> list[bytes]:
    """The inverse of join.

    >>> split(join([b"ab", b"", b"c"]), 3)
    [b'ab', b'', b'c']

    Raises:
        PayloadError: the lengths do not add up.
    """
    if count == 1:
        return [message]
    payloads: list[bytes] = []
    position = 0
    for _ in range(count):
        if position + _LENGTH.size > len(message):
            raise PayloadError(f"message: {len(message)} bytes end before payload {len(payloads)} of {count}")
        (length,) = _LENGTH.unpack_from(message, position)
        position += _LENGTH.size
        payloads.append(message[position : position + length])
        position += length
    if position != len(message):
        raise PayloadError(f"message: {count} payloads take {position} bytes, it has {len(message)}")
    return payloads


def perform(requests: Sequence[Request], transport: Transport) -> list[Reply]:
    """Carry out all requests with at most one mean and one gather."""
    means = [r.tensors for r in requests if r.tensors is not None]
    payloads = [r.payload for r in requests if r.payload is not None]
    averaged = iter(transport.mean([t for tensors in means for t in tensors])) if means else iter(())
    by_rank = (
        [split(message, len(payloads)) for message in transport.gather(join(payloads))] if payloads else []
    )
    by_request = iter(zip(*by_rank, strict=True))
    return [
        Reply(tensors=[next(averaged) for _ in r.tensors])
        if r.tensors is not None
        else Reply(payloads=next(by_request))
        for r in requests
    ]


def drive(
    running: Sequence[Rounds], transport: Transport, after_each: Callable[[], None] = lambda: None
) -> list[list[Tensor]]:
    """Run generators of requests to their ends, each round's requests in one message; returns their results.

    Args:
        running: as many on every replica, with requests of the same kinds.
        transport: the way to the other replicas.
        after_each: called after the messages of each round, before their replies are used. Default: nothing.
    """
    results: dict[int, list[Tensor]] = {}

    def advance(index: int, reply: Reply | None) -> Request | None:
        try:
            return next(running[index]) if reply is None else running[index].send(reply)
        except StopIteration as end:
            results[index] = end.value
            return None

    waiting = [(i, request) for i in range(len(running)) if (request := advance(i, None)) is not None]
    while waiting:
        replies = perform([request for _, request in waiting], transport)
        after_each()
        answered = zip([i for i, _ in waiting], replies, strict=True)
        waiting = [(i, request) for i, reply in answered if (request := advance(i, reply)) is not None]
    return [results[i] for i in range(len(running))]
