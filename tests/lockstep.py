"""Replicas as threads of one process, for tests of what replicas compute rather than of how they talk."""

import threading
from concurrent.futures import ThreadPoolExecutor

from muonwire.exchange import Exchange, Meter


class LockstepExchange(Exchange):
    """One of ``world_size`` replicas that share ``slots`` and meet at ``barrier``; ``forge`` may change what one sends."""

    def __init__(self, rank, slots, barrier, forge=None):
        self.rank, self.world_size, self.meter = rank, len(slots), Meter()
        self._slots, self._barrier, self._forge = slots, barrier, forge

    def _all(self, value):
        self._slots[self.rank] = value
        self._barrier.wait(timeout=60)
        everything = list(self._slots)
        self._barrier.wait(timeout=60)
        self.agreed |= self.requested
        return everything

    def gather(self, payload, *, purpose="update"):
        forged = self._forge is not None and purpose == "update"
        return self._all(self._forge(self.rank, payload) if forged else payload)

    def mean(self, tensors, *, purpose="update"):
        by_rank = self._all([t.clone() for t in tensors])
        return [sum(same) / len(by_rank) for same in zip(*by_rank, strict=True)]


def lockstep(function, world_size, forge=None):
    """``function(exchange)`` on every replica: what each returns, in rank order; the first exception is raised."""
    slots, barrier = [None] * world_size, threading.Barrier(world_size)

    def run(rank):
        try:
            return function(LockstepExchange(rank, slots, barrier, forge))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
    # A broken barrier is another replica's failure, whose own exception says more.
    errors = [f.exception() for f in futures]
    first = [e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)]
    for error in first or [e for e in errors if e is not None]:
        raise error
    return [f.result() for f in futures]
