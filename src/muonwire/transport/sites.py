"""Replicas in sites: dense inside a site, where links are fast, and one exchange between sites, where they are slow.

A site is a group of replicas that act as one: they hold the same weights and optimizer states, take the same steps with the mean of
their gradients, and exchange as one replica of the world of sites. The first replica of a site, its leader, sends what all of them
have encoded to the other leaders, and hands what came to the replicas of its site. So one copy of each payload crosses between two
sites, however many replicas they have.
"""

import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import DivergedReplicasError, ExchangeError, ReplicaLostError, UsageError
from muonwire.transport.base import Flag, Transport, check_count
from muonwire.transport.channel import Channel
from muonwire.transport.frames import Accept, FrameTransport
from muonwire.transport.header import SiteFailedError
from muonwire.transport.meter import Meter, Traffic
from muonwire.transport.process_group import ProcessGroupTransport

Result = TypeVar("Result")
_COUNT = struct.Struct("<Q")
_CHECK = struct.Struct("<I")
# The first byte of what a leader hands to its site: the result of an operation, or its error.
_GOOD, _BAD = b"+", b"-"


class Alone(FrameTransport):
    """Inside a site of one replica: nothing is sent."""

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=1, device=torch.device("cpu"))

    @override
    def channel(self) -> Channel:
        return Channel(Alone(), at_once=True)

    @override
    def carry(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        raise AssertionError("a site of one replica has nobody to talk to")


class SiteTransport(Transport):
    """The transport of a replica that acts as one with the others of its site; ``site_transport`` makes it.

    ``rank`` is the number of the site and ``world_size`` that of the sites. Every operation first compares what the replicas of a
    site are about to send, by a checksum of four bytes; then the leader carries it out with the other leaders, and hands
    its site the result, or the error that it got. An error is raised on every replica of every site: where a site loses a
    replica, its leader says so in place of its next operation with the other leaders.

    ``meter`` counts what crosses between sites, which is nothing on replicas that are not leaders; its seconds of waiting include
    those inside the site. ``inside_traffic`` is what went on inside.

    Args:
        everyone: between all replicas of all sites.
        inside: between the replicas of this site.
        between: between the leaders; None on the others.
        ranks: of the replicas by site, as ``everyone`` numbers them.
        averages: whether the optimizer averages the gradients of a site before each step. False where the loop has done it, as with
            DistributedDataParallel inside a site. Default: True.
        again: makes ``inside`` and ``between`` once more, for a channel of the given number; all replicas call it together.
            Default: they make channels by themselves.
    """

    def __init__(
        self,
        everyone: Transport,
        inside: FrameTransport,
        between: FrameTransport | None,
        *,
        ranks: Sequence[Sequence[int]],
        averages: bool = True,
        again: "Callable[..., tuple[FrameTransport, FrameTransport | None]] | None" = None,
    ) -> None:
        self.ranks = [list(of_site) for of_site in ranks]
        self.rank = next(i for i, of_site in enumerate(self.ranks) if everyone.rank in of_site)
        self.world_size = len(self.ranks)
        self.num_inside = inside.world_size
        self.averages_inside = averages
        self.takes_turns = everyone.takes_turns
        self.inside = inside
        self.between = between
        self.meter = Meter() if between is None else between.meter
        self._everyone = everyone
        self._again = again
        self._failure: ExchangeError | None = None
        self._channels: list[tuple[Channel, SiteTransport]] = []
        self.members = tuple(f"site {i}" for i in range(self.world_size))
        # One place to see for whom this replica waits, under the names of the sites.
        inside.members, inside.waits = (self.members[self.rank],) * self.num_inside, self.waits
        if between is not None:
            between.members, between.waits = self.members, self.waits

    @property
    @override
    def everyone(self) -> Transport:
        return self._everyone

    @property
    def is_leader(self) -> bool:
        """Whether this replica talks to the other sites."""
        return self.inside.rank == 0

    @property
    @override
    def inside_traffic(self) -> Traffic:
        return sum((t.inside_traffic for _, t in self._channels), self.inside.meter.total)

    @override
    def called(self, rank: int) -> str:
        return f"site {rank}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise: the groups of the sites are not known where it would be unpickled.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "SiteTransport: it cannot be pickled, since its process groups are not known where it is unpickled; save the "
            "optimizer's state_dict(), and make site_transport() and the optimizer anew before loading it"
        )

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        return self._relay(
            f"gather {observers}",
            [payload],
            lambda between: between.gather(payload, purpose=purpose, observers=observers),
            purpose,
            pack=_pack,
            unpack=_unpack,
        )

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        check_count(payloads, self.world_size)
        return self._relay(
            "all-to-all",
            payloads,
            lambda between: between.all_to_all(payloads, purpose=purpose),
            purpose,
            pack=_pack,
            unpack=_unpack,
        )

    @torch.no_grad()
    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """Mean over the sites, each of which counts once; see Transport."""

        def unpack(message: bytes) -> list[Tensor]:
            return [_tensor(body, like) for body, like in zip(_unpack(message), tensors, strict=True)]

        return self._relay(
            f"mean {[(t.dtype, *t.shape) for t in tensors]}",
            map(_bytes, tensors),
            lambda between: between.mean(tensors, purpose=purpose),
            purpose,
            pack=lambda means: _pack([_bytes(mean) for mean in means]),
            unpack=unpack,
        )

    @override
    def gather_inside(self, payload: bytes) -> list[bytes]:
        with self._operation():
            return self._at_home(lambda: self.inside.gather(payload, purpose="control"), "control")

    @override
    def mean_inside(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with self._operation():
            return self._at_home(lambda: self.inside.mean(tensors), "update")

    @override
    def channel(self) -> Channel:
        """A channel with ways of its own inside the site and between the sites."""
        at_once = False
        if self._again is not None:
            inside, between = self._again(channel=len(self._channels) + 1)
        else:
            parts = [None if part is None else part.channel() for part in (self.inside, self.between)]
            ways = [part and part.transport for part in parts]
            assert all(way is None or isinstance(way, FrameTransport) for way in ways)
            inside, between = ways  # type: ignore[assignment]
            at_once = all(part.at_once for part in parts if part is not None)
        made = SiteTransport(self._everyone, inside, between, ranks=self.ranks, averages=False)
        made.waits.limit_s = self.waits.limit_s
        channel = Channel(made, at_once=at_once)
        self._channels.append((channel, made))
        return channel

    def close(self) -> None:
        """Say goodbye to the other replicas, as ProcessGroupTransport.close does, in the site and between the sites."""
        for _, channel in self._channels:
            channel.close()
        for part in (self.inside, self.between):
            close = getattr(part, "close", None)
            if close is not None:
                close()

    # An operation

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
                    message = _BAD + json.dumps(_described(error)).encode()
            message = self._at_home(lambda: self._hand_on(message, purpose), purpose)
            if error is not None:
                raise error
            if message[:1] == _BAD:
                _raise(json.loads(message[1:]))
            self.agreed |= Flag(message[1])
            return result if result is not None else unpack(message[2:])

    def _agree(self, kind: str, own: "Sequence[bytes] | map[bytes]", purpose: str) -> Flag:
        """Make sure that the replicas of the site are about to send the same; returns the flags of all of them."""
        check = zlib.crc32(kind.encode())
        for payload in own:
            check = zlib.crc32(payload, zlib.crc32(_COUNT.pack(len(payload)), check))
        inside = self.inside

        def compare() -> list[bytes]:
            checks = inside.gather(_CHECK.pack(check), purpose=purpose)
            differing = [str(self.ranks[self.rank][i]) for i, c in enumerate(checks) if c != checks[0]]
            if differing:
                raise DivergedReplicasError(
                    f"the replicas of site {self.rank} are not alike: what replica(s) {', '.join(differing)} would send in step "
                    f"{self.step} is not what replica {self.ranks[self.rank][0]} would. They must start from the same weights and "
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
        between.requested, between.agreed = flags, Flag.NONE
        return act(between), between.agreed

    def _at_home(self, act: Callable[[], Result], purpose: str, *, flags: Flag = Flag.NONE) -> Result:
        """Something inside the site; where it fails, the other sites are told."""
        inside = self.inside
        inside.step, inside.settings, inside.series = self.step, self.settings, self.series
        inside.requested, inside.agreed = flags, Flag.NONE
        before_s = inside.meter.total.wait_s
        try:
            return act()
        except ExchangeError as error:
            self._tell(error)
            raise self._of_our_site(error) from error
        finally:
            self.meter.add(purpose, Traffic(wait_s=inside.meter.total.wait_s - before_s))

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """Let every operation after a failed one fail at once."""
        if self._failure is not None:
            described = _described(self._failure)
            _raise(
                {
                    **described,
                    "text": f"this transport failed before and cannot be used again: {described['text']}",
                }
            )
        try:
            yield
        except ExchangeError as error:
            self._failure = error
            raise

    # What goes wrong

    def _tell(self, error: ExchangeError) -> None:
        """Tell the other sites that this one cannot go on, wherever their leaders listen next."""
        if self.between is None:
            return
        lost = error.rank if isinstance(error, ReplicaLostError) else None
        own = partial(self.between.report, lost=lost)
        beside = [(c, partial(t.between.report, lost=lost)) for c, t in self._channels if t.between]
        if not beside or any(channel.at_once for channel, _ in beside):
            for report in (own, *(r for _, r in beside)):
                report()
            return
        # Their next operation may be on any of the ways; on the others nobody listens until this process ends.
        said = threading.Event()

        def say(report: Callable[[], None]) -> None:
            report()
            said.set()

        threading.Thread(target=say, args=(own,), name="muonwire-report", daemon=True).start()
        for channel, report in beside:
            channel.start(partial(say, report))
        said.wait()

    def _replica(self, site: int, place: int | None) -> int | None:
        """The number of a replica among all, from its place in its site."""
        return None if place is None or place >= len(self.ranks[site]) else self.ranks[site][place]

    def _of_our_site(self, error: ExchangeError) -> ExchangeError:
        """What the replicas of this site raise where something failed in it."""
        if not isinstance(error, ReplicaLostError):
            return type(error)(str(error))
        lost = self._replica(self.rank, error.rank)
        who = "a replica" if lost is None else f"replica {lost}"
        return ReplicaLostError(
            f"replica {self._everyone.rank} of site {self.rank} lost {who} of its site in step {self.step}; in the words of the "
            f"site, whose replicas {_listed(self.ranks[self.rank])} are counted from 0: {error}",
            rank=lost,
        )

    def _in_our_words(self, error: ExchangeError) -> ExchangeError:
        """What the replicas of this site raise where its leader got an error from the other leaders."""
        if isinstance(error, SiteFailedError):
            lost = self._replica(error.site, error.lost)
            if lost is None:
                return ExchangeError(
                    f"site {error.site} (replicas {_listed(self.ranks[error.site])}) cannot go on, in step {self.step}; its own "
                    "replicas say why"
                )
            return ReplicaLostError(
                f"site {self.rank} lost site {error.site} in step {self.step}, since that one lost its replica {lost}",
                rank=lost,
            )
        if isinstance(error, ReplicaLostError):
            known = error.rank is not None and error.rank < self.world_size
            leader = self.ranks[error.rank][0] if known else None  # type: ignore[index]
            who = "another site" if leader is None else f"replica {leader}, which leads site {error.rank},"
            return ReplicaLostError(
                f"site {self.rank} lost {who} in step {self.step}; in the words of the leaders, who are numbered by site: {error}",
                rank=leader,
            )
        return type(error)(f"between sites, which are the replicas here: {error}")


def _described(error: ExchangeError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "rank": error.rank if isinstance(error, ReplicaLostError) else None,
    }


def _raise(described: dict[str, Any]) -> NoReturn:
    """Raise the error that a leader got."""
    if described["kind"] == "ReplicaLostError":
        raise ReplicaLostError(described["text"], rank=described["rank"])
    kinds: dict[str, type[ExchangeError]] = {"DivergedReplicasError": DivergedReplicasError}
    raise kinds.get(described["kind"], ExchangeError)(described["text"])


def _listed(ranks: Sequence[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])


def _pack(payloads: Sequence[bytes]) -> bytes:
    """Their number, their lengths, and the payloads."""
    lengths = [_COUNT.pack(len(p)) for p in payloads]
    return b"".join([_COUNT.pack(len(payloads)), *lengths, *payloads])


def _unpack(message: bytes) -> list[bytes]:
    """The inverse of _pack.

    >>> _unpack(_pack([b"ab", b"", b"c"]))
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
