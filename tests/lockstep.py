"""Replicas as threads of one process that take turns, for tests of what replicas compute rather than of how they talk."""

from muonwire.exchange import run_threads


def lockstep(function, world_size, forge=None):
    """``function(exchange)`` on every replica: what each returns, in rank order; the first exception is raised.

    ``forge(rank, payload)`` may change what a replica sends.
    """

    def worker(rank, make):
        exchange = make()
        if forge is not None:
            gather = exchange.gather

            def forged(payload, *, purpose="update"):
                return gather(forge(rank, payload) if purpose == "update" else payload, purpose=purpose)

            exchange.gather = forged
        return function(exchange)

    return run_threads(worker, replicas=world_size)
