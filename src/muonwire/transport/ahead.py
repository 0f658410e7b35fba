"""Receives that are posted ahead: the buffers for what each peer sends next.

gloo sends a message's bytes once its receiver has told that a buffer waits for them. Where the buffer is posted when the message
is due, the telling and the message take one delay of the link each; where it was posted before, while the replica computed, the
message takes one alone. So each buffer is posted again as soon as it is read.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from muonwire.errors import ReplicaLostError


class InFlight(NamedTuple):
    """A message on its way, and the buffer that must outlive it."""

    peer: int
    buffer: Tensor
    work: dist.Work


Receive = Callable[[int, Tensor], InFlight]


class Ahead:
    """The buffers of one group of replicas, of which all its transports take what comes.

    Args:
        make: makes a buffer.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._buffers: dict[int, Tensor] = {}
        self._posted: dict[int, InFlight] = {}

    def take(self, peer: int, receive: Receive) -> InFlight:
        """The next message of a peer, for which a buffer waits from now on at the latest.

        Raises:
            ReplicaLostError: what ``receive`` raises.
        """
        return self._posted.pop(peer, None) or self._post(peer, receive)

    def post(self, peers: Iterable[int], receive: Receive) -> None:
        """Let buffers wait for the peers' next messages; what was in them is gone. A peer that is lost is left out."""
        for peer in peers:
            # It is lost for the next operation, which says so, and not for the one that has just ended.
            with suppress(ReplicaLostError):
                self._posted[peer] = self._post(peer, receive)

    def missing(self, peers: Iterable[int]) -> list[int]:
        """Of these, the peers whose messages have not come, as far as can be seen."""
        return [peer for peer in peers if peer in self._buffers and self._buffers[peer][0] == 0]

    def _post(self, peer: int, receive: Receive) -> InFlight:
        if peer not in self._buffers:
            self._buffers[peer] = self._make()
        buffer = self._buffers[peer]
        # No header starts with zero: what is still zero has not come.
        buffer.numpy()[0] = 0
        return receive(peer, buffer)
