"""The contract of a transport whose members come and go: replicas, or sites of replicas that act as one.

It also keeps what the members exchanged in their last attempt at a synchronization, so that those that are left can complete it
without one that is away.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor
from typing_extensions import override

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.transport.base import Flag, Transport
from muonwire.transport.channel import Channel

if TYPE_CHECKING:
    from muonwire.transport.elastic import ElasticSettings

State = dict[str, Any]
Result = TypeVar("Result")


class MembersTransport(Transport):
    """Transport between those members that are there; ``muonwire.optim.elastic.Elastic`` steps with it.

    ``form`` meets the others and must come before every synchronization; rank, world size and members are then those of this
    quorum. An operation that fails ends the transport until the next ``form``. All replicas of a site call everything together.

    Attributes:
        how: see ElasticSettings.
        name: of this member.
        epoch: which quorum this is; a new one has a higher number.
        give_state: gives the state for a member that joins.
        take_state: takes it over.
        stopping: whether this replica is asked to stop waiting.
        attempted: the quorum of the last attempt at a synchronization; -1 for none.
        prepared: whether this member had all messages of that attempt.
        sizes: the number of replicas of each member, by rank; empty where that is not known yet.
        place: of this replica in its site.
    """

    elastic = True
    how: "ElasticSettings"
    name: str
    epoch = -1
    attempted = -1
    prepared = False
    sizes: Sequence[int] = ()
    place = 0
    _replayed: Iterator[tuple[Any, Flag]] | None = None

    def _begin_alone(self, how: "ElasticSettings", name: str) -> None:
        self.how = how
        self.name = name
        self.give_state: Callable[[], State] = dict
        self.take_state: Callable[[State], None] = lambda state: None
        self.stopping: Callable[[], bool] = lambda: False
        self._kept: list[tuple[Any, Flag]] = []
        self._attempted_as = (0, 1)

    @property
    @abstractmethod
    def commits(self) -> int:
        """Synchronizations that this member knows to be done; one with fewer takes over the state of one with more."""

    @commits.setter
    @abstractmethod
    def commits(self, count: int) -> None: ...

    @abstractmethod
    def form(self) -> bool:
        """Meet the members that are there, and take over their state where this one is behind; returns whether the quorum is new.

        Raises:
            ExchangeError: too few came in ``patience_s``, or this machine's address has changed.
            ReplicaLostError: the site of this replica has lost one of its replicas.
            StoppedError: ``stopping`` said so while this member waited.
            UsageError: what ``take_state`` raises.
        """

    @abstractmethod
    def commit(self, failure: Exception | None = None) -> bool:
        """Count a synchronization as done, or with ``failure`` as not, after which all meet anew; whether it is done."""

    @abstractmethod
    def patient(self) -> AbstractContextManager[None]:
        """Within the block a member that takes over the state of another is waited for, as long as ``join_s``."""

    @abstractmethod
    def close(self) -> None:
        """Leave: the others go on without this member from their next synchronization on."""

    def stops(self) -> bool:
        """Whether this member is asked to leave; the same on all replicas of a site, which ask together."""
        return self.stopping()

    @property
    def data_slice(self) -> tuple[int, int]:
        """Which slice of a step's batch is this replica's, and of how many: a slice for each replica of each member, by rank."""
        sizes = self.sizes or (self.num_inside,) * self.world_size
        return sum(sizes[: self.rank]) + self.place, sum(sizes)

    @override
    def called(self, rank: int) -> str:
        # A message of an earlier quorum may be of a rank that this one lacks.
        return f"replica {self.members[rank] if rank < len(self.members) else rank}"

    @override
    def channel(self) -> Channel:
        """Raise: who is there is found out at each synchronization.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "ElasticTransport: replicas that come and go have no second channel; step with Elastic"
        )

    # The last attempt

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        gather = super().gather  # type: ignore[safe-super]
        return self._keeping(purpose, lambda: gather(payload, purpose=purpose, observers=observers))

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        all_to_all = super().all_to_all  # type: ignore[safe-super]
        return self._keeping(purpose, lambda: all_to_all(payloads, purpose=purpose))

    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        mean = super().mean  # type: ignore[safe-super]
        return self._keeping(purpose, lambda: mean(tensors, purpose=purpose))

    def attempt(self) -> None:
        """Begin a synchronization: what the members exchange from now on is kept until the next one, for ``replaying``."""
        self._kept.clear()
        self.attempted, self.prepared = self.epoch, False
        self._attempted_as = self.rank, self.world_size

    def forget_attempt(self) -> None:
        """Drop what is kept of a synchronization that failed."""
        self._kept.clear()
        self.attempted, self.prepared = -1, False

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Within the block, exchanges give what they gave in the last attempt, and nothing is sent to other members."""
        self._replayed = iter(list(self._kept))
        now = self.rank, self.world_size
        self.rank, self.world_size = self._attempted_as
        try:
            yield
        finally:
            self._replayed = None
            self.rank, self.world_size = now

    def _keeping(self, purpose: str, operate: Callable[[], Result]) -> Result:
        if purpose in ("control", "settle"):
            # Comparisons belong to a quorum, and a replay settles nothing.
            return operate()
        if self._replayed is not None:
            kept = next(self._replayed, None)
            if kept is None:
                # All stopped between two rounds of the attempt, behind the same one, so that nobody has moved.
                self.forget_attempt()
                raise ReplicaLostError("the last attempt ended between two of its rounds; all repeat it")
            result, agreed = kept
            self.agreed |= agreed
            return cast(Result, result)
        if purpose == "update":
            # An exchange of several rounds is settled after each of them; all messages are there behind the last.
            self.prepared = False
        result = operate()
        self._kept.append((result, self.agreed))
        return result

    def _settling(self, operate: Callable[[], object]) -> None:
        """Say that this member has all messages, and hear it from the others by ``operate``; nothing in a replay."""
        if self._replayed is None:
            self.prepared = True
            operate()
