"""Receives that are posted ahead: the buffers for what each peer sends next.

gloo sends a message's bytes once its receiver has told that a buffer waits for them. Where the buffer is posted when the message
is due, the telling and the message take one delay of the link each; where it was posted before, the message takes one alone. So
``DEPTH`` buffers wait for each peer, and each is posted again as soon as it is read: one for the message that follows on some
computation, and one each for those that follow on another message, whose telling travels at the same time as that one.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from muonwire.errors import ReplicaLostError

# With two, the telling arrives just when the message is due; the third leaves it some time.
DEPTH = 3


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
        self._posted: dict[int, deque[InFlight]] = {}
        # The buffers of the messages that were taken last.
        self._taken: dict[int, Tensor] = {}

    def take(self, peer: int, receive: Receive) -> InFlight:
        """The next message of a peer, for which a buffer waits from now on at the latest; it is read until ``post``.

        Raises:
            ReplicaLostError: what ``receive`` raises.
        """
        posted = self._posted.setdefault(peer, deque())
        if not posted:
            posted.append(_post(peer, self._make(), receive))
        message = posted.popleft()
        self._taken[peer] = message.buffer
        return message

    def post(self, peers: Iterable[int], receive: Receive) -> None:
        """Let buffers wait for the peers' next messages; what was in the last one is gone. A peer that is lost is left out."""
        for peer in peers:
            posted, read = self._posted[peer], self._taken.pop(peer)
            # It is lost for the next operation, which says so, and not for the one that has just ended.
            with suppress(ReplicaLostError):
                posted.append(_post(peer, read, receive))
                while len(posted) < DEPTH:
                    posted.append(_post(peer, self._make(), receive))

    def missing(self) -> list[int]:
        """The peers whose messages were taken and have not come, as far as can be seen."""
        return [peer for peer, buffer in self._taken.items() if buffer[0] == 0]


def _post(peer: int, buffer: Tensor, receive: Receive) -> InFlight:
    # No header starts with zero: what is still zero has not come.
    buffer.numpy()[0] = 0
    return receive(peer, buffer)
