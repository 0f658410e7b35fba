"""Replicas in sites: dense inside a site, where links are fast, and one exchange between sites, where they are slow.

A site is a group of replicas that act as one: they hold the same weights and optimizer states, take the same steps with the mean of
their gradients, and exchange as one replica of the world of sites. The first replica of a site, its leader, sends what all of them
have encoded to the other leaders, and hands what came to the replicas of its site. So one copy of each payload crosses between two
sites, however many replicas they have.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import ExchangeError, ReplicaLostError, UsageError
from muonwire.transport.base import Transport
from muonwire.transport.channel import Channel
from muonwire.transport.frames import Accept, FrameTransport
from muonwire.transport.header import SiteFailedError
from muonwire.transport.meter import Traffic
from muonwire.transport.relay import Relay


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


class SiteTransport(Relay):
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

    ends_with_others = True

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
        super().__init__(inside, between, averages=averages)
        self.ranks = [list(of_site) for of_site in ranks]
        self.rank = self.site = next(i for i, of_site in enumerate(self.ranks) if everyone.rank in of_site)
        self.site_name = f"site {self.rank}"
        self.world_size = len(self.ranks)
        self.takes_turns = everyone.takes_turns
        self._everyone = everyone
        self._again = again
        self._channels: list[tuple[Channel, SiteTransport]] = []
        self.members = tuple(f"site {i}" for i in range(self.world_size))
        inside.members = (self.site_name,) * self.num_inside
        if between is not None:
            between.members = self.members

    @property
    @override
    def everyone(self) -> Transport:
        return self._everyone

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

    # What goes wrong

    @override
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

    @override
    def _of_our_site(self, error: ExchangeError) -> ExchangeError:
        if not isinstance(error, ReplicaLostError):
            return type(error)(str(error))
        lost = self._replica(self.rank, error.rank)
        who = "a replica" if lost is None else f"replica {lost}"
        return ReplicaLostError(
            f"replica {self._everyone.rank} of site {self.rank} lost {who} of its site in step {self.step}; in the words of the "
            f"site, whose replicas {_listed(self.ranks[self.rank])} are counted from 0: {error}",
            rank=lost,
        )

    @override
    def _in_our_words(self, error: ExchangeError) -> ExchangeError:
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


def _listed(ranks: Sequence[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
