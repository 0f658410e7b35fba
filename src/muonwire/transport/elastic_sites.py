"""A site among members that come and go: replicas that were started together, and are there as a whole or not at all.

Only the site's leader talks to torchft and to the other members, by an ElasticTransport. What comes of it (who is there, whether a
synchronization is done, a state that is taken over, an error) it hands to its site, so that all replicas of it go the same way.

While the leader waits for other members it says so to its site a few times a second. So it learns of a replica that is asked to
stop, and each learns at once of one that is lost. Then all of them end with one error, and the other members see that one has left.
"""

import io
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from typing_extensions import override

from muonwire.errors import ExchangeError, ReplicaLostError, StoppedError, UsageError
from muonwire.transport.base import Flag, Transport
from muonwire.transport.digest import check_agreement
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from muonwire.transport.frames import FrameTransport
from muonwire.transport.members import MembersTransport
from muonwire.transport.meter import Meter, Traffic
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.relay import Relay, described, raise_described
from muonwire.transport.secret import Secret
from muonwire.transport.waiting import Waits

# The first byte of what a leader says to its site when members meet: it waits still, or how that ended.
_WAITS, _MET = b"w", b"m"
# A state is handed on in pieces of so many bytes.
_PIECE_BYTES = 1 << 28
_LONGER_S = 30.0


class ElasticSiteTransport(MembersTransport, Relay):
    """Transport of a replica of a site, which is a member among those that come and go; see MembersTransport.

    ``rank`` is that of the site among the members that are there, and ``world_size`` their number; another member may be a single
    replica (ElasticTransport) or a site of any size. Each counts once in a mean. One copy of each payload crosses between two
    members, and one of a state that a site takes over.

    ``meter`` counts what crosses between members, which is nothing on replicas that are not leaders. ``inside_traffic`` is what
    went on inside the site.

    An operation between members that fails, fails on all replicas of the site, until the next ``form``. Where the site loses a
    replica, this transport ends: every later operation, and ``form``, raises the same ReplicaLostError.

    Args:
        how: see ElasticSettings; the leader's counts, and its name is the site's.
        inside: between the replicas of this site, for as long as they run. A replica of it is waited for as long as ``timeout_s``,
            the leader, which waits for other members, as long as the group waits for a message: give it ``longest_wait_s``.
            Default: the default process group.
        averages: whether the optimizer averages the gradients of the site before each step; False where the loop does, as with
            DistributedDataParallel. Default: True.
        secret: of all members of the run, for what goes between them. Default: none.
        run: name of the run that the tags stand for. Default: none.
        allow_public: listen without a secret where the internet may reach it. Default: no.

    Raises:
        UsageError: torchft is not installed, or ``inside`` is itself a transport of members; on all replicas of the site.
        ExchangeError: the lighthouse cannot be reached, or strangers could take part; on all replicas of the site.
    """

    between: ElasticTransport | None
    ends_with_others = False

    def __init__(
        self,
        how: ElasticSettings,
        *,
        inside: FrameTransport | None = None,
        averages: bool = True,
        secret: Secret | None = None,
        run: str = "",
        allow_public: bool = False,
    ) -> None:
        inside = ProcessGroupTransport() if inside is None else inside
        if isinstance(inside, MembersTransport) or not isinstance(inside, FrameTransport):
            raise UsageError(
                f"elastic: inside a site there is a {type(inside).__name__}; give a ProcessGroupTransport between its replicas, or "
                "make an ElasticTransport for a member of one replica"
            )
        check_agreement(f"averages={averages}", inside, what="site")
        opening: dict[str, Any] = {}
        between = None
        if inside.rank == 0:
            try:
                between = ElasticTransport(how, secret=secret, run=run, allow_public=allow_public)
                opening = {"name": between.name}
            except (ExchangeError, UsageError) as error:
                opening = {"error": described(error)}
        try:
            opening = json.loads(inside.gather(json.dumps(opening).encode(), purpose="control")[0])
        except ExchangeError:
            if between is not None:
                between.close()
            raise
        if "error" in opening:
            raise_described(opening["error"])
        if isinstance(inside, ProcessGroupTransport):
            inside._limit = timedelta(seconds=how.timeout_s)
        self._begin_alone(how, opening["name"])
        Relay.__init__(self, inside, between, averages=averages)
        self.rank, self.world_size, self.place = 0, 1, inside.rank
        self.ranks, self.site, self.site_name = [list(range(inside.world_size))], 0, f"site {self.name}"
        self.takes_turns = inside.takes_turns
        self.members = (self.name,)
        inside.members = (self.site_name,) * inside.world_size
        self._commits = 0
        self._awaited = ""
        # The state that the leader has fetched and taken over, until it has handed it to its site.
        self._fetched = b""
        if between is not None:
            between.take_content = self._fetch
            between.give_state = lambda: self.give_state()
            between.stopping = self._beat

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise: the members are not known where it would be unpickled.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "ElasticSiteTransport: it cannot be pickled, since its members are not known where it is unpickled; save the "
            "optimizer's state_dict(), and make the transport and the optimizer anew before loading it"
        )

    @property
    @override
    def everyone(self) -> Transport:
        return self.inside

    @property
    @override
    def inside_traffic(self) -> Traffic:
        return self.inside.meter.total

    @property
    @override
    def commits(self) -> int:
        return self._commits

    @commits.setter
    @override
    def commits(self, count: int) -> None:
        self._commits = count
        if self.between is not None:
            self.between.commits = count

    # Meeting

    @override
    def form(self) -> bool:
        if self._failure is not None:
            raise_described(described(self._failure))
        with self._quietly():
            outcome = self._follow() if self.between is None else self._lead(self.between)
            content = b"".join(
                self._say_on(self._fetched[begin : begin + _PIECE_BYTES])
                for begin in range(0, outcome["state_bytes"], _PIECE_BYTES)
            )
        self._fetched = b""
        self._commits = outcome["commits"]
        if content and self.between is None:
            self._take_over(content)
        if "error" in outcome:
            raise_described(outcome["error"])
        if outcome["is_new"]:
            self.agreed, self.sizes = Flag.NONE, ()
        self.rank, self.world_size = outcome["rank"], len(outcome["members"])
        self.members, self.epoch = tuple(outcome["members"]), outcome["epoch"]
        is_new: bool = outcome["is_new"]
        return is_new

    def _lead(self, between: ElasticTransport) -> dict[str, Any]:
        """Meet the other members, and say to the site how it ended."""
        outcome: dict[str, Any]
        try:
            outcome = {"is_new": between.form()}
            outcome |= {"rank": between.rank, "members": between.members, "epoch": between.epoch}
        except (ExchangeError, StoppedError, UsageError) as error:
            if self._failure is not None:
                # Not of the others: it is that this site has lost a replica.
                raise
            outcome = {"error": described(error)}
        outcome |= {"commits": between.commits, "state_bytes": len(self._fetched)}
        self._ask_home(_MET + json.dumps(outcome).encode())
        return outcome

    def _follow(self) -> dict[str, Any]:
        """What the leader says how it ended."""
        self._awaited = "the other replicas to synchronize"
        with self.waits.on(lambda: self._awaited, answer="the replicas met"):
            while (message := self._ask_home(b""))[:1] == _WAITS:
                self._awaited = message[1:].decode()
        outcome: dict[str, Any] = json.loads(message[1:])
        return outcome

    def _beat(self) -> bool:
        """Say to the site that its leader waits; returns whether a replica of it is asked to stop."""
        assert self.between is not None
        self._ask_home(_WAITS + self.between._awaited.encode())
        return Flag.STOP in self.inside.agreed

    def _ask_home(self, own: bytes) -> bytes:
        """The leader's message; afterwards ``inside.agreed`` says whether anybody in the site is asked to stop."""
        flags = Flag.STOP if self.stopping() else Flag.NONE
        return self._at_home(lambda: self.inside.gather(own, purpose="control")[0], "control", flags=flags)

    def _say_on(self, message: bytes) -> bytes:
        return self._at_home(lambda: self._hand_on(message, "control"), "control")

    def _fetch(self, content: bytes) -> None:
        # What it refuses, its site does not get, but the error; the last one that it takes over stands.
        self._take_over(content)
        self._fetched = content

    def _take_over(self, content: bytes) -> None:
        self.take_state(torch.load(io.BytesIO(content), weights_only=True))

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Within the block it is for other members that this replica waits, and not for its leader's next word."""
        self.inside.waits = Waits(Meter())
        try:
            yield
        finally:
            self.inside.waits = self.waits

    @override
    def stops(self) -> bool:
        with self._operation():
            self._ask_home(b"")
            return Flag.STOP in self.inside.agreed

    @override
    def commit(self, failure: Exception | None = None) -> bool:
        if failure is not None:
            # All replicas of the site have it, or this one ends by itself.
            if self.between is not None:
                self.between.commit(failure)
            return False
        with self._operation():
            said: dict[str, Any] = {}
            if self.between is not None:
                said = {"done": self.between.commit(), "commits": self.between.commits}
            said = json.loads(self._say_on(json.dumps(said).encode()))
        self._commits = said["commits"]
        done: bool = said["done"]
        return done

    @override
    def patient(self) -> AbstractContextManager[None]:
        return nullcontext() if self.between is None else self.between.patient()

    @override
    def close(self) -> None:
        if self.between is not None:
            self.between.close()

    # Exchanging

    @override
    def attempt(self) -> None:
        super().attempt()
        if self.between is not None:
            self.between.attempt()

    @override
    def forget_attempt(self) -> None:
        super().forget_attempt()
        if self.between is not None:
            self.between.forget_attempt()

    @override
    def settle(self) -> None:
        self._settling(
            lambda: self._relay(
                "settle",
                [],
                lambda between: between.settle(),
                "settle",
                pack=lambda _: b"",
                unpack=lambda _: None,
            )
        )

    # What goes wrong

    @override
    def _tell(self, error: ExchangeError) -> None:
        if self.between is not None:
            self.between.abort(error)

    @override
    def _of_our_site(self, error: ExchangeError) -> ExchangeError:
        if not isinstance(error, ReplicaLostError):
            return type(error)(str(error))
        who = "a replica" if error.rank is None else f"replica {error.rank}"
        return ReplicaLostError(
            f"replica {self.place} of {self.site_name} lost {who} of its site in step {self.step} ({error}); a site is there as a "
            "whole or not at all: start it again with --resume, and it joins the others",
            rank=error.rank,
        )

    @override
    def _in_our_words(self, error: ExchangeError) -> ExchangeError:
        return error


def longest_wait_s(how: ElasticSettings) -> float:
    """How long a leader may wait for other members in one operation, in seconds."""
    return 2 * max(how.timeout_s, how.join_s) + _LONGER_S
