"""One round of exchange: the requests of several groups in one message."""

import struct
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from muonwire.codec.host import fetch, on_host
from muonwire.errors import PayloadError
from muonwire.transport.base import Transport

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a stage wants exchanged: ``tensors`` to average, a ``payload`` to gather, or ``parts``, one for each replica.

    Or ``values``, which no other replica sees: tensors of a device that the host wants to read, with those of all groups at once.

    Args:
        tensors: to average.
        payload: for all replicas.
        parts: one payload for each replica, in rank order.
        values: to read; the next request follows before any message is sent.
        observers: with a payload: whether those of replicas that observe are gathered, too (``Transport.gather``).
    """

    tensors: Sequence[Tensor] | None = None
    payload: bytes | None = None
    parts: Sequence[bytes] | None = None
    values: Sequence[Tensor] | None = None
    observers: bool = False

    def __post_init__(self) -> None:
        assert [self.tensors, self.payload, self.parts, self.values].count(None) == 3


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to a request: averaged tensors, values as arrays, or in rank order all payloads or what each sent to this one."""

    tensors: Sequence[Tensor] = ()
    payloads: Sequence[bytes] = ()
    values: Sequence[Any] = ()


# The rounds of a stage: it yields requests, is sent replies, and returns the updates.
Rounds = Generator[Request, Reply, list[Tensor]]
Result = TypeVar("Result")


def read(tensors: Sequence[Tensor]) -> Generator[Request, Reply, list[Any]]:
    """``fetch`` in the rounds of a stage: what lies on a device is read together with what other groups read."""
    if all(on_host(t.device) for t in tensors):
        return fetch(tensors)
    reply = yield Request(values=tensors)
    return list(reply.values)


def at_once(running: Generator[Request, Reply, Result]) -> Result:
    """The result of a generator that only reads."""
    try:
        request = next(running)
        while True:
            assert request.values is not None
            request = running.send(Reply(values=fetch(request.values)))
    except StopIteration as end:
        result: Result = end.value
        return result


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
    """Carry out all requests with at most one mean, one gather, one of observers' payloads too, and one all-to-all."""
    means = [r.tensors for r in requests if r.tensors is not None]
    averaged = iter(transport.mean([t for tensors in means for t in tensors])) if means else iter(())
    gathered = {
        observers: _gather(
            [r.payload for r in requests if r.payload is not None and r.observers == observers],
            transport,
            observers=observers,
        )
        for observers in (False, True)
    }
    exchanged = _exchange([r.parts for r in requests if r.parts is not None], transport)
    return [
        Reply(tensors=[next(averaged) for _ in r.tensors])
        if r.tensors is not None
        else Reply(payloads=next(exchanged if r.parts is not None else gathered[r.observers]))
        for r in requests
    ]


def _gather(
    payloads: Sequence[bytes], transport: Transport, *, observers: bool
) -> Iterator[tuple[bytes, ...]]:
    """By payload: those of all replicas."""
    if not payloads:
        return iter(())
    message = join(payloads)
    messages = transport.gather(message, observers=True) if observers else transport.gather(message)
    return iter(zip(*(split(m, len(payloads)) for m in messages), strict=True))


def _exchange(requests: Sequence[Sequence[bytes]], transport: Transport) -> Iterator[tuple[bytes, ...]]:
    """By request: what each replica sent to this one; nothing where its message does not add up, since only this one sees it."""
    if not requests:
        return iter(())
    received = transport.all_to_all([join(parts) for parts in zip(*requests, strict=True)])
    by_rank: list[list[bytes]] = []
    for message in received:
        try:
            by_rank.append(split(message, len(requests)))
        except PayloadError:
            by_rank.append([b""] * len(requests))
    return iter(zip(*by_rank, strict=True))


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

    def after_reading(waiting: list[tuple[int, Request]]) -> list[tuple[int, Request]]:
        """What all want exchanged, once they have read what they want to read."""
        while reading := [(i, request.values) for i, request in waiting if request.values is not None]:
            arrays = iter(fetch([t for _, values in reading for t in values]))
            answers = {i: Reply(values=[next(arrays) for _ in values]) for i, values in reading}
            moved = [(i, advance(i, answers[i]) if i in answers else request) for i, request in waiting]
            waiting = [(i, request) for i, request in moved if request is not None]
        return waiting

    started = [(i, request) for i in range(len(running)) if (request := advance(i, None)) is not None]
    waiting = after_reading(started)
    while waiting:
        replies = perform([request for _, request in waiting], transport)
        after_each()
        answered = zip([i for i, _ in waiting], replies, strict=True)
        waiting = [(i, request) for i, reply in answered if (request := advance(i, reply)) is not None]
        waiting = after_reading(waiting)
    return [results[i] for i in range(len(running))]
