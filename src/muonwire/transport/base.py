"""The contract of a transport: payloads and means between replicas, every byte counted."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.transport.meter import Meter, Traffic
from muonwire.transport.waiting import Waits

if TYPE_CHECKING:
    from muonwire.transport.channel import Channel

Result = TypeVar("Result")


class Flag(enum.IntFlag):
    """What the header of a message can announce to the other replicas."""

    NONE = 0
    OBSERVES = 0x10  # this replica takes the others' outcome and brings nothing to it
    CHANGED = 0x20  # this replica's weights were changed from outside
    DIVERGED = 0x40  # this replica's loss or update is not finite
    STOP = 0x80  # this replica was asked to stop


class Transport(ABC):
    """Moves payloads between replicas. All replicas call the same operations in the same order.

    The flags in ``requested`` travel in the header of the replica's next message. ``agreed`` collects the flags of all replicas and
    changes on all of them after the same operation, so that all can act on a flag in the same step without a further message.

    ``step`` is the optimizer step that the next messages belong to. The optimizer sets it before it sends; every message carries it
    (modulo 2³²), and replicas in different steps get an ExchangeError that names them.

    ``settings`` is a text that must be the same on all replicas in this step, such as the learning rates; its checksum of one byte
    travels with every message.

    ``series`` names messages whose lengths follow from one another; frames are made for the length of the last one of their series.

    A replica that ``observes`` takes part in operations of the purpose "update" without counting in them: it sends no payload,
    means are over the others, and ``gather`` and ``all_to_all`` return the others' payloads alone.

    An operation that raises ExchangeError or ReplicaLostError ends the transport: every later one raises the same class at once.

    Where the replicas of a *site* act as one (``Relay``), ``rank`` is that of the site and ``world_size`` the number of
    sites, and what is sent must be the same on all replicas of a site. Elsewhere a site has one replica.

    A copy, deep or not, is the transport itself: a copied optimizer keeps its link.
    """

    rank: int
    world_size: int
    meter: Meter
    requested: Flag = Flag.NONE
    agreed: Flag = Flag.NONE
    step: int = 0
    settings: str = ""
    series: str = ""
    observes: bool = False
    # Whether the replicas compute one after the other, so that waiting says nothing of a link.
    takes_turns: bool = False
    # Whether replicas come and go, so that their number says nothing of the run.
    elastic: bool = False
    # Replicas of a site, and whether their gradients are averaged before each step.
    num_inside: int = 1
    averages_inside: bool = False
    # Whether these hold a shard of every weight each, and not the whole; see MeshTransport.
    shards_inside: bool = False

    @cached_property
    def members(self) -> tuple[str, ...]:
        """Names of the replicas by rank, as the meter, events and messages have them. Default: "0", "1", ..."""
        return tuple(str(rank) for rank in range(self.world_size))

    @cached_property
    def waits(self) -> Waits:
        """For whom this replica waits, and since when."""
        return Waits(self.meter)

    def called(self, rank: int) -> str:
        """What messages call a replica, such as "replica 2", with its address where that is known."""
        return f"replica {self.members[rank]}"

    @abstractmethod
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        """Give ``payload`` to every replica and return all replicas' payloads in rank order (sizes may differ).

        Args:
            payload: of this replica.
            purpose: under which the meter counts it. Default: "update".
            observers: whether of updates those of observers are taken, too: where they bring no update of their own but the mean of
                the others' (``all_to_all``). All replicas give the same. Default: no, they are left out.

        Raises:
            ExchangeError: the replicas are in different steps or operations, or gather for different purposes; on all of them.
            ReplicaLostError: a replica stopped answering.
        """

    @abstractmethod
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        """Give ``payloads[j]`` to replica j, and return what each replica gave to this one, in rank order.

        Sizes may differ. Of updates those of observers are left out; an observer gets those of the others all the same.

        Args:
            payloads: one for each replica in rank order, this one included.
            purpose: under which the meter counts them. Default: "update".

        Raises:
            UsageError: more or fewer payloads than replicas.
            ExchangeError: the replicas are in different steps or operations, or exchange for different purposes; on all of them.
            ReplicaLostError: a replica stopped answering.
        """

    @abstractmethod
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """Mean over the replicas of each tensor, summed in rank order, so that all replicas get identical bits.

        Observers do not count in the mean of updates.

        Shapes and dtypes must agree between the replicas. Sums of 16-bit dtypes are taken in float32.

        Raises:
            ExchangeError: the replicas are in different steps or operations, or average different tensors; on all of them.
            ReplicaLostError: a replica stopped answering.
        """

    @property
    def everyone(self) -> "Transport":
        """Between all replicas that were started together, each by itself: this transport, except where replicas act as sites."""
        return self

    @property
    def inside_traffic(self) -> Traffic:
        """What this replica has sent and received inside its site, of all purposes."""
        return Traffic()

    def gather_inside(self, payload: bytes) -> list[bytes]:
        """The payloads of the replicas of this site, in rank order; they may differ.

        Raises:
            ExchangeError, ReplicaLostError: as ``gather``; replicas of other sites then get one in their next operation.
        """
        return [payload]

    def mean_inside(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Mean over the replicas of this site of each tensor, identical bits on all of them; see ``mean``.

        Raises:
            ExchangeError, ReplicaLostError: as ``gather_inside``.
        """
        return list(tensors)

    def as_one(self, act: Callable[[], Result]) -> Result:
        """The result of ``act``, which all processes of a replica with sharded weights call together.

        An error of one of them is raised by all, and names the process. Elsewhere it only calls ``act``.
        """
        return act()

    def settle(self) -> None:  # noqa: B027 - most transports have nothing to do
        """Make sure, where replicas come and go, that all have all messages of the operations so far; else nothing.

        Raises:
            ReplicaLostError: one of them does not.
        """

    def channel(self) -> "Channel":
        """A second way to the same replicas, with a sequence of its own; all of them call it together.

        Raises:
            UsageError: this transport cannot.
        """
        raise UsageError(
            f"{type(self).__name__}: it has no second channel, on which messages travel while the replica goes on; use "
            "ProcessGroupTransport or run_threads, or local steps with fragments=1 and delay=0"
        )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """The result of ``compute``, work that all replicas do alike on what they received; it must not be changed afterwards.

        Replicas of one process may share the result; the meter of each counts the time that it took. By default it is computed
        each time.

        Args:
            key: everything that the result depends on.
            compute: without side effects.
        """
        return compute()


def check_count(payloads: Sequence[bytes], world_size: int) -> None:
    """Raise UsageError where an all-to-all has not one payload a replica."""
    if len(payloads) != world_size:
        raise UsageError(
            f"all-to-all: {len(payloads)} payloads for {world_size} replicas; give one for each, in rank order"
        )


class SingleReplica(Transport):
    """The transport of a replica that trains alone: nothing is sent, and a mean is the replica's own tensors.

    >>> SingleReplica().gather(b"abc")
    [b'abc']
    """

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        self.meter = Meter()

    @override
    def channel(self) -> "Channel":
        from muonwire.transport.channel import Channel

        return Channel(self, at_once=True)

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        self.agreed |= self.requested
        return [payload]

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        check_count(payloads, self.world_size)
        self.agreed |= self.requested
        return list(payloads)

    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        self.agreed |= self.requested
        return list(tensors)
