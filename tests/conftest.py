import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as the replicas of the tests have: sums of floats depend on it, and a training run sets its own."""
    torch.set_num_threads(1)
