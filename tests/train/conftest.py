import os
from contextlib import contextmanager

import pytest


@contextmanager
def serving():
    # Before torchft's core is loaded: it would write each quorum to standard error.
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    times = {"join_timeout_ms": 2000, "heartbeat_timeout_ms": 1000, "quorum_tick_ms": 20}
    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, **times)
    yield f"127.0.0.1:{server.address().rpartition(':')[2]}"
    server.shutdown()


@pytest.fixture
def lighthouse():
    """HOST:PORT of a lighthouse that lasts as long as the test."""
    with serving() as place:
        yield place


@pytest.fixture
def later_lighthouse():
    """Another one, which knows nothing of members that were there before."""
    with serving() as place:
        yield place
