"""Transports copied and pickled."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.transport import ProcessGroupTransport, SingleReplica, run_threads
from tests.replicas import run_replicas


def _copies(transport):
    held = {"link": transport}
    return [copy.copy(transport), copy.deepcopy(transport), copy.deepcopy(held)["link"]]


def test_a_copy_is_the_transport_itself():
    transport = SingleReplica()
    assert all(c is transport for c in _copies(transport))

    def worker(_, make):
        own = make()
        return all(c is own for c in _copies(own))

    assert run_threads(worker, replicas=2) == [True, True]


def test_a_single_replica_pickles():
    transport = SingleReplica()
    transport.step = 3
    again = pickle.loads(pickle.dumps(transport))
    assert (again.rank, again.world_size, again.step) == (0, 1, 3)
    assert again.gather(b"x") == [b"x"]


def test_a_transport_between_threads_says_what_to_do_instead_of_pickling():
    def worker(_, make):
        with pytest.raises(UsageError, match=r"state_dict\(\)"):
            pickle.dumps(make())

    run_threads(worker, replicas=2)


def _pickled():
    transport = ProcessGroupTransport()
    assert all(c is transport for c in _copies(transport))
    transport.gather(b"before")
    again = pickle.loads(pickle.dumps(transport))
    world = pickle.loads(pickle.dumps(ProcessGroupTransport(dist.group.WORLD)))
    other = ProcessGroupTransport(dist.new_group([0, 1]))
    try:
        pickle.dumps(other)
    except UsageError as error:
        refused = str(error)
    return (
        again.gather(b"x"),
        world.gather(b"y"),
        again.meter is transport.meter,
        refused,
        pickle.dumps(transport),
    )


def test_a_transport_of_the_default_group_is_made_anew_and_one_of_another_group_is_refused():
    for again, world, shared, refused, data in run_replicas(_pickled, 2):
        assert (again, world, shared) == ([b"x"] * 2, [b"y"] * 2, False)
        assert "ProcessGroupTransport(group)" in refused
        with pytest.raises(UsageError, match="not initialized"):
            pickle.loads(data)


def test_an_optimizer_that_is_copied_keeps_its_transport():
    transport = SingleReplica()
    optimizer = recipes.build("adamw", torch.nn.Linear(2, 2), lr=0.1, transport=transport)
    assert copy.deepcopy(optimizer).transport is transport
