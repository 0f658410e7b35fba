"""Transport between replicas that are threads of one process: many replicas on few cores.

The replicas take turns: one computes while the others wait for messages, so a run needs one core however many replicas it has,
and two of them never compete for the interpreter. Frames, bytes and results are those of ProcessGroupTransport, to the last bit:
torch's generators, which the threads share, are handed on with the turn, so that each replica draws its own random numbers.
"""

import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.transport.channel import Channel
from muonwire.transport.frames import Accept, FrameTransport
from muonwire.transport.generators import random_state, set_random_state
from muonwire.transport.meter import Traffic

Result = TypeVar("Result")


class _Hub:
    """What the threads share: the turn, the messages on their way, results that one computed for all, and failures."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.messages: defaultdict[tuple[Hashable, int, int], deque[tuple[bytes, Tensor]]] = defaultdict(
            deque
        )
        # By key: the result, the seconds that it took, and how many replicas still need it.
        self.shared: dict[Hashable, tuple[Any, float, int]] = {}
        self.failures: dict[int, BaseException] = {}
        # By transport and number of the meeting: what each replica that has come to it brought.
        self.meetings: dict[Hashable, dict[int, Any]] = {}

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Let other threads have the turn until it is so; torch's generators are then where this one left them."""
        if ready():
            return
        random = random_state()
        self.turn.wait_for(ready)
        set_random_state(random)


class ThreadTransport(FrameTransport):
    """Transport of one of the replicas that ``run_threads`` started.

    Args:
        rank: of this replica.
        world_size: number of replicas.
        hub: shared by them.
        number: of this transport among those of its replica; it keeps the messages of two transports apart.
    """

    takes_turns = True

    def __init__(self, *, rank: int, world_size: int, hub: _Hub, number: Hashable) -> None:
        super().__init__(rank=rank, world_size=world_size, device=torch.device("cpu"))
        self._hub = hub
        self._number = number
        self._num_channels = 0
        self._num_meetings = 0
        # How many transports were made between the same of its replicas.
        self._num_among: Counter[tuple[int, ...]] = Counter()

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise: the other replicas are threads of this process.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "ThreadTransport: a transport between threads cannot be pickled, since the other replicas are in this process; save "
            "the optimizer's state_dict(), and make the optimizer anew inside run_threads before loading it"
        )

    @override
    def channel(self) -> Channel:
        """A channel that does everything at once: replicas that take turns have nothing to go on with."""
        self._num_channels += 1
        number = (self._number, self._num_channels)
        return Channel(
            ThreadTransport(rank=self.rank, world_size=self.world_size, hub=self._hub, number=number),
            at_once=True,
        )

    def among(self, ranks: Sequence[int]) -> "ThreadTransport":
        """A transport between these of the replicas, this one among them, which all call it."""
        key = tuple(ranks)
        self._num_among[key] += 1
        return ThreadTransport(
            rank=key.index(self.rank),
            world_size=len(key),
            hub=self._hub,
            number=(self._number, key, self._num_among[key]),
        )

    @override
    def carry(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        """Put the messages into the peers' queues; while it waits, another thread has the turn."""
        hub = self._hub
        for peer, body in outgoing.items():
            hub.messages[self._number, self.rank, peer].append((header, body.clone()))
        hub.turn.notify_all()
        boxes = {peer: hub.messages[self._number, peer, self.rank] for peer in incoming}
        hub.wait_for(lambda: all(boxes.values()) or bool(hub.failures))
        lost = [peer for peer, box in boxes.items() if not box]
        if lost:
            rank = next(iter(hub.failures))
            raise ReplicaLostError(
                f"replica {self.rank} lost replica {rank} (of {self.world_size}) in step {self.step}: {hub.failures[rank]}",
                rank=rank,
            )
        messages = {peer: box.popleft() for peer, box in boxes.items()}
        if header:
            accept({peer: theirs for peer, (theirs, _) in messages.items()})
        for peer, (_, body) in messages.items():
            incoming[peer].copy_(body)

    def meet(self, mine: Any, work: Callable[[Sequence[Any]], None]) -> None:
        """Wait for the other replicas; the last one to come does ``work``, with what each brought in rank order, before all go on.

        Raises:
            ReplicaLostError: another replica failed.
        """
        hub = self._hub
        self._num_meetings += 1
        key = (self._number, self._num_meetings)
        brought = hub.meetings.setdefault(key, {})
        brought[self.rank] = mine
        if len(brought) == self.world_size:
            work([brought[rank] for rank in range(self.world_size)])
            del hub.meetings[key]
            hub.turn.notify_all()
            return
        hub.wait_for(lambda: key not in hub.meetings or bool(hub.failures))
        if key in hub.meetings:
            rank = next(iter(hub.failures))
            raise ReplicaLostError(
                f"replica {self.rank} lost replica {rank} (of {self.world_size}): {hub.failures[rank]}",
                rank=rank,
            )

    @override
    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Let the first replica compute, and the others take its result.

        The meter counts as if each had computed it by itself: the seconds that it took are subtracted from the others' waiting.
        """
        hub = self._hub
        key = (self._number, key)
        if key not in hub.shared:
            start_s = time.perf_counter()
            result = compute()
            hub.shared[key] = (result, time.perf_counter() - start_s, self.world_size - 1)
        else:
            result, seconds, takers = hub.shared[key]
            hub.shared[key] = (result, seconds, takers - 1)
            self.meter.add("update", Traffic(wait_s=-seconds))
        if hub.shared[key][2] == 0:
            del hub.shared[key]
        return result


def run_threads(
    worker: Callable[[int, Callable[[], FrameTransport]], Result], *, replicas: int
) -> list[Result]:
    """Run ``worker`` on each replica, in threads that take turns; returns what each returned, in rank order.

    Args:
        worker: is given the rank and a function that makes a fresh transport; all replicas make the same number of them.
        replicas: number of threads. Each begins with torch's generators where they are now, and they are then where the first
            replica left them.

    Raises:
        BaseException: what the first replica that failed raised; the others are ended by a ReplicaLostError.

    >>> run_threads(lambda rank, exchange: exchange().gather(bytes([rank])), replicas=2)
    [[b'\\x00', b'\\x01'], [b'\\x00', b'\\x01']]
    """
    hub = _Hub()
    num_threads = torch.get_num_threads()
    results: dict[int, Result] = {}
    random = random_state()
    of_first = random

    def replica(rank: int) -> None:
        nonlocal of_first
        made = 0

        def transport() -> FrameTransport:
            nonlocal made
            made += 1
            return ThreadTransport(rank=rank, world_size=replicas, hub=hub, number=made)

        with hub.turn:
            # The number of arithmetic threads belongs to the thread that sets it.
            torch.set_num_threads(num_threads)
            set_random_state(random)
            try:
                results[rank] = worker(rank, transport)
            except BaseException as error:
                hub.failures[rank] = error
                hub.turn.notify_all()
            if rank == 0:
                of_first = random_state()

    threads = [threading.Thread(target=replica, args=(rank,), daemon=True) for rank in range(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    set_random_state(of_first)
    for error in hub.failures.values():
        raise error
    return [results[rank] for rank in range(replicas)]
