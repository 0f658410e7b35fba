import pytest
import torch

# Files that share what is costly to make.
TOGETHER = {"tests/lab/test_claims.py": "lab", "tests/lab/test_page.py": "lab"}


def pytest_collection_modifyitems(config, items):
    """With several workers, a file's tests stay on one, so that its fixtures are made once."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        path = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(TOGETHER.get(path, path)))


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as the replicas of the tests have: sums of floats depend on it, and a training run sets its own."""
    torch.set_num_threads(1)
