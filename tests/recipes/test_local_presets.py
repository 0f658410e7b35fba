"""MuLoCo, DiLoCo and SparseLoCo against their algorithms."""

import math

import torch

from muonwire import recipes
from muonwire.codec import payload as payloads
from tests.lockstep import lockstep
from tests.models import SmallNet, train, weights

H, ROUNDS = 4, 3


def rounds(transport, name):
    """Weights after each round, and the updates' messages."""
    sent, gather = [], transport.gather

    def noted(payload, purpose="update"):
        if purpose == "update":
            sent.append(payload)
        return gather(payload, purpose=purpose)

    transport.gather = noted
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, interval=H)
    history = []
    for start in range(0, ROUNDS * H, H):
        train(model, optimizer, H, start=start, rank=transport.rank, world_size=transport.world_size)
        history.append(weights(model))
    return history, sent


def test_diloco_is_nesterov_on_the_mean_weight_change():
    """Douillard et al., algorithm 1, with PyTorch's own SGD outside."""
    (history, _), _ = lockstep(lambda transport: rounds(transport, "diloco"), 2)
    local = [SmallNet(), SmallNet()]
    inner = [recipes.build("adamw", model, lr=0.01) for model in local]
    shared = [torch.nn.Parameter(p.detach().clone()) for p in SmallNet().parameters()]
    outer = torch.optim.SGD(shared, lr=0.7, momentum=0.9, nesterov=True)
    for number, got in enumerate(history):
        for rank in range(2):
            train(local[rank], inner[rank], H, start=number * H, rank=rank, world_size=2)
        for anchor, *copies in zip(shared, *(m.parameters() for m in local), strict=True):
            anchor.grad = sum(anchor.detach() - p.detach() for p in copies) / 2
        outer.step()
        with torch.no_grad():
            for anchor, *copies in zip(shared, *(m.parameters() for m in local), strict=True):
                for p in copies:
                    p.copy_(anchor)
        for anchor, (name, value) in zip(shared, got.items(), strict=True):
            # A few roundings a round of numbers below 4.
            assert torch.allclose(anchor, value, rtol=0, atol=2**-18), name


def test_muloco_sends_two_bits_an_entry_and_the_levels_of_each_tensor():
    (_, sent), _ = lockstep(lambda transport: rounds(transport, "muloco"), 2)
    assert len(sent) == ROUNDS
    for message in sent:
        for entry in payloads.unpack(message):
            assert len(entry.body) == math.ceil(2 * math.prod(entry.shape) / 8) + 2 * (1 + 4)


def test_sparseloco_sends_the_largest_of_each_tile():
    """On a weight of 128 × 96 in tiles of 64 × 48: 64 entries of each tile come through, those of largest change."""
    model = torch.nn.Linear(96, 128, bias=False)
    optimizer = recipes.build("sparseloco", model, lr=0.01, interval=1)
    before = model.weight.detach().clone()
    model.weight.grad = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    # One local step of the inner optimizer alone says what there is to send.
    alone = torch.nn.Linear(96, 128, bias=False)
    with torch.no_grad():
        alone.weight.copy_(before)
    alone.weight.grad = model.weight.grad
    recipes.build("adamw", alone, lr=0.01).step()
    optimizer.step()
    change = (before - alone.weight.detach()).abs()
    moved = model.weight.detach() != before
    for row in (0, 64):
        for column in (0, 48):
            tile = slice(row, row + 64), slice(column, column + 48)
            assert moved[tile].sum() == 64
            assert change[tile][moved[tile]].min() >= change[tile][~moved[tile]].max()
