"""Replicas as threads of one process that take turns, for tests of what replicas compute rather than of how they talk."""

from muonwire.transport import run_threads


def lockstep(function, world_size, forge=None):
    """``function(exchange)`` on every replica: what each returns, in rank order; the first exception is raised.

    ``forge(rank, payload)`` may change what a replica sends.
    """

    def worker(rank, make):
        transport = make()
        if forge is not None:
            gather = transport.gather

            def forged(payload, *, purpose="update"):
                return gather(forge(rank, payload) if purpose == "update" else payload, purpose=purpose)

            transport.gather = forged
        return function(transport)

    return run_threads(worker, replicas=world_size)
