"""Replicas that are groups of processes: what one process says, all of its replica do."""

import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from muonwire.errors import ExchangeError, PayloadError, UsageError
from muonwire.transport import Flag, mesh_transport
from tests.replicas import run_replicas


def _talk():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    transport = mesh_transport(mesh)
    here = dist.get_rank() == 3
    found = {"place": (transport.rank, transport.place, transport.world_size, transport.num_inside)}
    found["gathered"] = transport.gather(b"%d" % dist.get_rank())
    found["inside"] = transport.gather_inside(b"%d" % dist.get_rank())
    found["mean"] = transport.mean_inside([torch.tensor([float(dist.get_rank())])])[0].item()
    # What one process alone knows of travels once its replica knows it, too.
    transport.requested |= Flag.STOP if here else Flag.NONE
    transport.gather(b"")
    before = transport.agreed
    transport.share(b"")
    transport.gather(b"")
    found["stop"] = (before, transport.agreed)

    def fail(error):
        def act():
            if here:
                raise error
            return 1

        try:
            return transport.as_one(act)
        except Exception as caught:
            return type(caught), str(caught)

    found["payload"] = fail(PayloadError("damaged"))
    found["other"] = fail(KeyError("no such thing"))
    found["after"] = fail(None) if not here else transport.as_one(lambda: 1)
    outgoing = torch.full((3,), dist.get_rank(), dtype=torch.uint8)
    sizes = [1, 2] if transport.place == 0 else [2, 1]
    received = [1, 2] if transport.place == 0 else [2, 1]
    found["swap"] = transport.swap(outgoing, sizes, received).tolist()
    found["inside bytes"] = transport.inside_traffic.sent_bytes
    with pytest.raises(UsageError, match="cannot be pickled"):
        pickle.dumps(transport)
    return found


def test_processes_of_a_replica_act_as_one():
    for rank, found in enumerate(run_replicas(_talk, 4)):
        replica, place = divmod(rank, 2)
        assert found["place"] == (replica, place, 2, 2)
        assert found["gathered"] == [b"%d" % place, b"%d" % (2 + place)]
        assert found["inside"] == [b"%d" % (2 * replica), b"%d" % (2 * replica + 1)]
        assert found["mean"] == 2 * replica + 0.5
        assert found["stop"] == (Flag.NONE, Flag.STOP)
        expected = {
            2: [(PayloadError, "process 1 of replica 1: damaged"), ExchangeError],
            3: [(PayloadError, "damaged"), KeyError],
        }.get(rank, [1, None])
        assert found["payload"] == expected[0]
        assert (found["other"] if expected[1] is None else found["other"][0]) == (expected[1] or 1)
        assert found["after"] == 1
        assert found["inside bytes"] > 3
        first, second = 2 * replica, 2 * replica + 1
        assert found["swap"] == ([first, second, second] if place == 0 else [first, first, second])
