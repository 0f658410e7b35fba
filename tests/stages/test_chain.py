"""What replicas of one process compute once for all of them."""

import pytest
import torch
from torch import nn

from muonwire import recipes
from muonwire.stages import Polar
from muonwire.transport import run_threads
from muonwire.transport.base import Transport
from muonwire.transport.threads import ThreadTransport

REPLICAS, STEPS = 3, 4


def trained(recipe):
    """Each replica's weights after some steps, every replica with gradients of its own."""
    name, options = recipes.parse_recipe(recipe)

    def replica(rank, make_transport):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6))
        optimizer = recipes.build(name, model, lr=0.05, transport=make_transport(), **options)
        data = torch.Generator().manual_seed(rank)
        for _ in range(STEPS):
            model(torch.randn(4, 8, generator=data)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.synchronize()
        return [p.detach().clone() for p in model.parameters()]

    return run_threads(replica, replicas=REPLICAS)


@pytest.mark.parametrize(
    ("recipe", "calls"),
    [
        ("muon", STEPS),
        ("approach_b", STEPS),
        # Before the exchange each replica has updates of its own.
        ("pre_polar", STEPS * REPLICAS),
        ("one_bit_muon(interval=2)", STEPS * REPLICAS),
    ],
)
def test_what_all_replicas_would_compute_alike_is_computed_once_with_the_same_bits(
    recipe, calls, monkeypatch
):
    apply, counted = Polar.apply, []
    monkeypatch.setattr(Polar, "apply", lambda self, *args: counted.append(1) or apply(self, *args))
    shared = trained(recipe)
    # Groups without anything for the stage do not call it.
    assert len(counted) == calls
    monkeypatch.setattr(ThreadTransport, "once", Transport.once)
    alone = trained(recipe)
    assert len(counted) == calls + STEPS * REPLICAS
    for ours, theirs in zip(shared, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
