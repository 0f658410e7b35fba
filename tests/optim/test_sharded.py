"""Parameters that are sharded within a replica: what cannot take them says so when it is built."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonwire import recipes
from muonwire.errors import UsageError
from tests.replicas import run_replicas

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 16, bias=False))


def _build(names):
    said = {}
    for name in names:
        model = net()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        try:
            recipes.build(name, model, lr=0.1)
        except UsageError as error:
            said[name] = str(error)
    return said


@pytest.fixture(scope="module")
def said():
    return run_replicas(_build, 2, ["muon", "distro", "dion", "one_bit_muon", "powersgd_muon", "psyche"])


@pytest.mark.parametrize("name", ["muon", "distro", "dion", "one_bit_muon", "powersgd_muon", "psyche"])
def test_what_needs_whole_tensors_refuses_shards_with_a_remedy(name, said):
    for by_name in said:
        assert "0.weight is sharded (a DTensor)" in by_name[name]
        assert "use the adamw recipe" in by_name[name]


def _train_sharded():
    whole, sharded = net(), net()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    for model in (whole, sharded):
        optimizer = recipes.build("adamw", model, lr=0.1)
        for _ in range(3):
            model(INPUTS).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    dist.barrier()
    return whole[0].weight.detach(), sharded[0].weight.full_tensor().detach()


def test_adamw_on_shards_is_adamw_on_the_whole():
    for whole, sharded in run_replicas(_train_sharded, 2):
        assert torch.allclose(whole, sharded, rtol=1e-5, atol=1e-7)
