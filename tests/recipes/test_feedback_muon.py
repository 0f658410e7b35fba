"""EF21-Muon against its algorithm."""

import torch

from muonwire import codec, recipes
from tests.lockstep import lockstep

LR, BETA, STEPS, CODEC = 0.1, 0.9, 4, "topk(density=0.25) | float32"
SHAPE = (6, 10)


class OneMatrix(torch.nn.Module):
    """A model of one hidden matrix, so that routing has something to orthogonalize."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)
        torch.nn.init.zeros_(self.hidden.weight)


def gradient(step, rank):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 * step + rank))


def replica(transport):
    model = OneMatrix()
    options = {"codec": CODEC, "momentum": BETA, "method": "svd", "dtype": "float32", "scale": "none"}
    optimizer = recipes.build(
        "ef21_muon", model, lr=LR, transport=transport, weight_decay=0.0, polar=["hidden"], **options
    )
    for step in range(STEPS):
        model.hidden.weight.grad = gradient(step, transport.rank)
        optimizer.step()
    return model.hidden.weight.detach()


def test_ef21_muon_is_the_described_one():
    """Gruntkowska et al., algorithm 1: momenta, compressed differences to the estimates, the polar factor of their mean."""
    first, second = lockstep(replica, 2)
    assert torch.equal(first, second)
    chosen = codec.parse(CODEC)
    weight, mean = torch.zeros(SHAPE), torch.zeros(SHAPE)
    momenta, estimates = [torch.zeros(SHAPE)] * 2, [torch.zeros(SHAPE)] * 2
    for step in range(STEPS):
        sent = []
        for rank in range(2):
            momenta[rank] = BETA * momenta[rank] + (1 - BETA) * gradient(step, rank)
            sent.append(chosen.decode(chosen.encode(momenta[rank] - estimates[rank])))
            estimates[rank] = estimates[rank] + sent[rank]
        mean = mean + (sent[0] + sent[1]) / 2
        left, values, right = torch.linalg.svd(mean, full_matrices=False)
        assert values[0] < 100 * values[-1]
        weight = weight - LR * left @ right
    # A polar factor moves by the rounding (2⁻²³ a sum of ten) times the condition, below 100; four of them add up.
    assert torch.allclose(first, weight, atol=1e-4)
