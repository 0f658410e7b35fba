import socket

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as the replicas of the tests have: sums of floats depend on it, and a training run sets its own."""
    torch.set_num_threads(1)


@pytest.fixture
def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
