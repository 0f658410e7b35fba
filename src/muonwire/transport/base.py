"""The contract of a transport: payloads and means between replicas, every byte counted."""

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self, TypeVar

from torch import Tensor
from typing_extensions import override

from muonwire.transport.meter import Meter

Result = TypeVar("Result")


class Flag(enum.IntFlag):
    """What a replica can tell the others in the header of a message."""

    NONE = 0
    CHANGED = 0x20  # this replica's weights were changed from outside
    DIVERGED = 0x40  # this replica's loss or update is not finite
    STOP = 0x80  # this replica was asked to stop


class Transport(ABC):
    """Moves payloads between replicas. All replicas call the same operations in the same order.

    A replica that adds to ``requested`` says so in the header of its next message. ``agreed`` is what any replica has said, and
    changes on all of them after the same operation, so that all can act on it in the same step without a message of its own.

    ``step`` is the optimizer step that the next messages belong to. Whoever talks through the transport sets it before; every
    message carries it (modulo 2³²), and replicas in different steps get an ExchangeError that names them.

    ``settings`` is what replicas must have in common in this step besides, such as learning rates, in words; a checksum of a byte
    travels with every message.

    An operation that raises ExchangeError or ReplicaLostError ends the transport: every later one raises the same class at once.

    A copy, deep or not, is the transport itself: a copied optimizer keeps its link.
    """

    rank: int
    world_size: int
    meter: Meter
    requested: Flag = Flag.NONE
    agreed: Flag = Flag.NONE
    step: int = 0
    settings: str = ""

    @abstractmethod
    def gather(self, payload: bytes, *, purpose: str = "update") -> list[bytes]:
        """Give ``payload`` to every replica and return all replicas' payloads in rank order (sizes may differ).

        Raises:
            ExchangeError: the replicas are in different steps or operations, or gather for different purposes; on all of them.
            ReplicaLostError: a replica stopped answering.
        """

    @abstractmethod
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """Mean over the replicas of each tensor, summed in rank order, so that all replicas get identical bits.

        Shapes and dtypes must agree between the replicas. Sums of 16-bit dtypes are taken in float32.

        Raises:
            ExchangeError: the replicas are in different steps or operations, or average different tensors; on all of them.
            ReplicaLostError: a replica stopped answering.
        """

    def __copy__(self) -> Self:
        """See the class."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """See the class."""
        return self

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """What ``compute`` returns, for work that all replicas do alike on what they received; nobody may change the result.

        Replicas of one process may share it; each is counted the time that it took. By default it is computed each time.

        Args:
            key: everything that the result depends on.
            compute: without side effects.
        """
        return compute()


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
    def gather(self, payload: bytes, *, purpose: str = "update") -> list[bytes]:
        """Return the one payload."""
        self.agreed |= self.requested
        return [payload]

    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """Return the tensors themselves."""
        self.agreed |= self.requested
        return list(tensors)
