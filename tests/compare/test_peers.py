"""Peers by themselves, in processes that talk over gloo."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from muonwire.compare.peers import find_peer
from muonwire.compare.peers.base import Replica
from tests.replicas import run_replicas


def weights_after(peer, steps):
    """Of a model whose gradients are more than DDP's first bucket holds."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(6)))
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size(), "master": "", "address": ""}
    training = find_peer(peer).start(Replica(model=model, forward=model, lr=0.01, **place))
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(1 + dist.get_rank()))
    for _ in range(steps):
        for optimizer in training.optimizers:
            optimizer.zero_grad()
        training.compute(x).square().mean().backward()
        training.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    return float((after - before).norm()), after.sum().item()


@pytest.mark.parametrize("hook", ["none", "bf16", "powersgd"])
def test_ddp_trains_a_model_of_several_buckets(hook):
    first, second = run_replicas(weights_after, 2, f"ddp_adamw(hook='{hook}')", 4)
    assert first == second
    assert first[0] > 0
