"""What a site does that acts as one replica: its leader talks to others, and hands what came of it to the replicas of the site.

Every operation first compares what the replicas of the site are about to send, by a checksum of four bytes; then the leader carries
it out, and hands its site the result, or the error that it got, which all of them raise.
"""

import json
import struct
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import (
    DivergedReplicasError,
    ExchangeError,
    ReplicaLostError,
    StoppedError,
    UsageError,
)
from muonwire.transport.base import Flag, Transport, check_count
from muonwire.transport.frames import FrameTransport
from muonwire.transport.meter import Meter, Traffic
from muonwire.transport.process_group import ProcessGroupTransport

Result = TypeVar("Result")
_COUNT = struct.Struct("<Q")
_CHECK = struct.Struct("<I")
# The first byte of what a leader hands to its site: the result of an operation, or its error.
_GOOD, _BAD = b"+", b"-"
# Errors that a leader hands on as what they are; others become an ExchangeError.
_KINDS = {kind.__name__: kind for kind in (DivergedReplicasError, StoppedError, UsageError)}


class Relay(Transport):
    """A transport whose replica acts as one with the others of its site.

    ``meter`` counts what crosses to other sites, which is nothing on replicas that are not leaders; its seconds of waiting include
    those inside the site. ``inside_traffic`` is what went on inside.

    Args:
        inside: between the replicas of this site.
        between: from its leader, the first of them, to the others; None on the rest.
        averages: whether the optimizer averages the gradients of the site before each step.
    """

    # The numbers of the replicas by site, of this launch, as ``everyone`` has them; and which of these sites this one is.
    ranks: list[list[int]]
    site: int
    # What messages call this site.
    site_name: str
    # Whether an error that came from others ends this transport, as one inside the site does.
    ends_with_others: bool

    def __init__(self, inside: FrameTransport, between: FrameTransport | None, *, averages: bool) -> None:
        self.inside = inside
        self.between = between
        self.num_inside = inside.world_size
        self.averages_inside = averages
        self.meter = Meter() if between is None else between.meter
        self._failure: ExchangeError | None = None
        # One place to see for whom this replica waits.
        inside.waits = self.waits
        if between is not None:
            between.waits = self.waits

    @property
    def is_leader(self) -> bool:
        """Whether this replica talks to the other sites."""
        return self.inside.rank == 0

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        return self._relay(
            f"gather {observers}",
            [payload],
            lambda between: between.gather(payload, purpose=purpose, observers=observers),
            purpose,
            pack=pack,
            unpack=unpack,
        )

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        check_count(payloads, self.world_size)
        return self._relay(
            "all-to-all",
            payloads,
            lambda between: between.all_to_all(payloads, purpose=purpose),
            purpose,
            pack=pack,
            unpack=unpack,
        )

    @torch.no_grad()
    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """Mean over the sites, each of which counts once; see Transport."""

        def read(message: bytes) -> list[Tensor]:
            return [_tensor(body, like) for body, like in zip(unpack(message), tensors, strict=True)]

        return self._relay(
            f"mean {[(t.dtype, *t.shape) for t in tensors]}",
            map(_bytes, tensors),
            lambda between: between.mean(tensors, purpose=purpose),
            purpose,
            pack=lambda means: pack([_bytes(mean) for mean in means]),
            unpack=read,
        )

    @override
    def gather_inside(self, payload: bytes) -> list[bytes]:
        with self._operation():
            return self._at_home(lambda: self.inside.gather(payload, purpose="control"), "control")

    @override
    def mean_inside(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with self._operation():
            return self._at_home(lambda: self.inside.mean(tensors), "update")

    def _relay(
        self,
        kind: str,
        own: "Sequence[bytes] | map[bytes]",
        act: Callable[[Transport], Result],
        purpose: str,
        *,
        pack: Callable[[Result], bytes],
        unpack: Callable[[bytes], Result],
    ) -> Result:
        """Compare ``kind`` and ``own`` inside the site, let the leader ``act``, and hand what it got to the site."""
        with self._operation():
            flags, result, message = self._agree(kind, own, purpose), None, b""
            error: ExchangeError | None = None
            if self.between is not None:
                try:
                    result, agreed = self._act(act, self.between, flags)
                    message = _GOOD + bytes([agreed]) + pack(result)
                except ExchangeError as caught:
                    error = self._in_our_words(caught)
                    message = _BAD + json.dumps(described(error)).encode()
            message = self._at_home(lambda: self._hand_on(message, purpose), purpose)
            if error is not None:
                raise error
            if message[:1] == _BAD:
                raise_described(json.loads(message[1:]))
            self.agreed |= Flag(message[1])
            return result if result is not None else unpack(message[2:])

    def _agree(self, kind: str, own: "Sequence[bytes] | map[bytes]", purpose: str) -> Flag:
        """Make sure that the replicas of the site are about to send the same; returns the flags of all of them."""
        check = zlib.crc32(kind.encode())
        for payload in own:
            check = zlib.crc32(payload, zlib.crc32(_COUNT.pack(len(payload)), check))
        inside, numbers = self.inside, self.ranks[self.site]

        def compare() -> list[bytes]:
            checks = inside.gather(_CHECK.pack(check), purpose=purpose)
            differing = [str(numbers[i]) for i, c in enumerate(checks) if c != checks[0]]
            if differing:
                raise DivergedReplicasError(
                    f"the replicas of {self.site_name} are not alike: what replica(s) {', '.join(differing)} would send in step "
                    f"{self.step} is not what replica {numbers[0]} would. They must start from the same weights and "
                    "take every step with the same gradients: let the optimizer average them, or DistributedDataParallel, and use "
                    "no arithmetic whose rounding depends on the machine"
                )
            return checks

        self._at_home(compare, purpose, flags=self.requested)
        return inside.agreed

    def _hand_on(self, message: bytes, purpose: str) -> bytes:
        """The leader's message; who waits for it waits for another site, and does so for longer."""
        if not isinstance(self.inside, ProcessGroupTransport):
            return self.inside.gather(message, purpose=purpose)[0]
        limit, self.inside._limit = self.inside._limit, None
        try:
            return self.inside.gather(message, purpose=purpose)[0]
        finally:
            self.inside._limit = limit

    def _act(
        self, act: Callable[[Transport], Result], between: FrameTransport, flags: Flag
    ) -> tuple[Result, Flag]:
        between.step, between.settings, between.series = self.step, self.settings, self.series
        between.requested, between.agreed, between.observes = flags, Flag.NONE, self.observes
        return act(between), between.agreed

    def _at_home(self, act: Callable[[], Result], purpose: str, *, flags: Flag = Flag.NONE) -> Result:
        """Something inside the site; where it fails, the other sites are told, and this transport ends."""
        inside = self.inside
        inside.step, inside.settings, inside.series = self.step, self.settings, self.series
        inside.requested, inside.agreed = flags, Flag.NONE
        before_s = inside.meter.total.wait_s
        try:
            return act()
        except ExchangeError as error:
            self._failure = self._of_our_site(error)
            self._tell(error)
            raise self._failure from error
        finally:
            self.meter.add(purpose, Traffic(wait_s=inside.meter.total.wait_s - before_s))

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """Let every operation after one that ended the transport fail at once."""
        if self._failure is not None:
            before = described(self._failure)
            raise_described(
                {
                    **before,
                    "text": f"this transport failed before and cannot be used again: {before['text']}",
                }
            )
        try:
            yield
        except ExchangeError as error:
            if self.ends_with_others:
                self._failure = error
            raise

    @abstractmethod
    def _tell(self, error: ExchangeError) -> None:
        """Tell the other sites that this one cannot go on, after an error inside it."""

    @abstractmethod
    def _of_our_site(self, error: ExchangeError) -> ExchangeError:
        """What the replicas of this site raise where something failed in it."""

    @abstractmethod
    def _in_our_words(self, error: ExchangeError) -> ExchangeError:
        """What the replicas of this site raise where its leader got an error from the other leaders."""


def described(error: Exception) -> dict[str, Any]:
    """An error as JSON has it."""
    return {
        "kind": "ReplicaLostError" if isinstance(error, ReplicaLostError) else type(error).__name__,
        "text": str(error),
        "rank": error.rank if isinstance(error, ReplicaLostError) else None,
    }


def raise_described(error: dict[str, Any]) -> NoReturn:
    """Raise the error that a leader got."""
    if error["kind"] == "ReplicaLostError":
        raise ReplicaLostError(error["text"], rank=error["rank"])
    raise _KINDS.get(error["kind"], ExchangeError)(error["text"])


def pack(payloads: Sequence[bytes]) -> bytes:
    """Their number, their lengths, and the payloads."""
    lengths = [_COUNT.pack(len(p)) for p in payloads]
    return b"".join([_COUNT.pack(len(payloads)), *lengths, *payloads])


def unpack(message: bytes) -> list[bytes]:
    """The inverse of pack.

    >>> unpack(pack([b"ab", b"", b"c"]))
    [b'ab', b'', b'c']
    """
    (count,) = _COUNT.unpack_from(message)
    position, payloads = _COUNT.size * (1 + count), []
    for i in range(count):
        (length,) = _COUNT.unpack_from(message, _COUNT.size * (1 + i))
        payloads.append(message[position : position + length])
        position += length
    return payloads


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, like: Tensor) -> Tensor:
    if not data:
        return torch.empty_like(like)
    return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape).to(like.device)
