import os
import socket
from pathlib import Path

import pytest
import torch

from tests.commands import start_server

# Commands that tests start elsewhere find the tests' own tasks.
ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
# The tests are of the CPU, whose bits many of them compare; `make gpu` checks a GPU. Neither they nor what they start see one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# There are more threads than cores: those that wait for others must not keep a core from them. OpenMP reads it when a process
# begins, so that it holds for the workers of a run of many tests and for all that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# What takes longest comes first, so that no worker is left with it at the end.
LONGEST = (
    "train/test_hosts.py",
    "train/test_elastic.py",
    "test_wireguard.py",
    "train/test_replicated.py",
    "test_scripts.py",
    "compare/test_emulate.py",
    "lab/claims/test_claims.py",
    "compare/test_compare.py",
    "transport/test_links.py",
    "optim/test_elastic.py",
    "optim/test_elastic_sites.py",
    "recipes/test_conformance.py",
    "recipes/test_recipes.py",
    "transport/test_rendezvous.py",
    "optim/test_faults.py",
    "test_snippets.py",
    "optim/test_streaming.py",
    "train/test_folders.py",
    "test_site.py",
    "test_add.py",
    "test_examples.py",
    "train/test_loop.py",
    "stages/test_owners.py",
    "stages/test_owners_bytes.py",
    "test_scale.py",
    "test_docs.py",
    "spectra/test_models.py",
)


def pytest_sessionstart(session):
    """A worker of many tests has a server of processes from the start."""
    if hasattr(session.config, "workerinput"):
        start_server()


def pytest_ignore_collect(collection_path):
    """What tests import has no examples to try, and would be imported by all workers, whether they have the test or not."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


def pytest_collection_modifyitems(items):
    """Order the files; the tests of a file stay as they are."""

    def place(item):
        path = item.path.as_posix()
        return next((i for i, name in enumerate(LONGEST) if path.endswith(f"tests/{name}")), len(LONGEST))

    items.sort(key=place)


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
