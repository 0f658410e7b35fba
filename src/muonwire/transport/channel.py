"""A channel: a second way to the same replicas, whose messages travel while the replica goes on.

What a channel is given is done one thing after the other, in the same order on all replicas, by a thread of its own; or at once,
where the replicas take turns or there is one.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from muonwire.transport.base import Transport
from muonwire.transport.meter import Traffic

Result = TypeVar("Result")


class Work(Generic[Result]):
    """Something that a channel was given to do.

    Args:
        act: what is to be done.

    Attributes:
        traffic: that it caused, by purpose, once it is done; ``wait_s`` in it are seconds that the channel's thread waited.
        peer_s: the same seconds by the name of the replica that was waited for.
    """

    def __init__(self, act: Callable[[], Result]) -> None:
        self._act: Callable[[], Result] | None = act
        self._done = threading.Event()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self.traffic: dict[str, Traffic] = {}
        self.peer_s: dict[str, float] = {}

    def run(self, transport: Transport) -> None:
        """Do it; what it raises is kept for ``result``."""
        assert self._act is not None
        meter = transport.meter
        before, peers_before = dict(meter.by_purpose), dict(meter.wait_s)
        try:
            self._result = self._act()
        except BaseException as error:
            self._error = error
        finally:
            self.traffic = {p: t - before.get(p, Traffic()) for p, t in meter.by_purpose.items()}
            self.peer_s = {name: s - peers_before.get(name, 0.0) for name, s in meter.wait_s.items()}
            # What it holds, such as the changes that were sent, is not needed any more.
            self._act = None
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._done.is_set()

    def wait(self) -> None:
        """Wait until it is over."""
        self._done.wait()

    def result(self) -> Result:
        """What it came to, once it is over; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


class Channel:
    """Does things with a transport of its own, in order.

    Args:
        transport: the second way to the replicas; while something is under way, nobody else uses it.
        at_once: do each thing when it is given, in the caller's thread. Default: in a thread of the channel.
    """

    def __init__(self, transport: Transport, *, at_once: bool = False) -> None:
        self.transport = transport
        self.at_once = at_once
        self._waiting: queue.SimpleQueue[Work[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, act: Callable[[], Result]) -> Work[Result]:
        """Have something done."""
        work = Work(act)
        if self.at_once:
            work.run(self.transport)
            return work
        if self._thread is None:
            # The number of arithmetic threads belongs to the thread that sets it; sums follow from it.
            args = (self._waiting, self.transport, torch.get_num_threads())
            self._thread = threading.Thread(target=_serve, args=args, name="muonwire-channel", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._waiting.put, None)
        self._waiting.put(work)  # type: ignore[arg-type]
        return work

    def waited_s(self) -> dict[str, float]:
        """The seconds that the channel has waited for each replica so far, those of a wait that lasts included."""
        seconds, wait = dict(self.transport.meter.wait_s), self.transport.waits.current
        if wait is not None and wait.peer:
            seconds[wait.peer] = seconds.get(wait.peer, 0.0) + time.perf_counter() - wait.began_s
        return seconds


def _serve(waiting: "queue.SimpleQueue[Work[object] | None]", transport: Transport, threads: int) -> None:
    torch.set_num_threads(threads)
    while (work := waiting.get()) is not None:
        work.run(transport)
        # Nothing of it is kept while the next one is waited for.
        del work
