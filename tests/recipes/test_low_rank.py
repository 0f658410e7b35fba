"""Approach E against its description."""

import torch

from muonwire import recipes
from tests.lockstep import lockstep
from tests.models import SmallNet

RANK, STEPS, BETA, LR = 2, 3, 0.9, 0.1
SHAPE = (12, 8)


def gradient(step, rank):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(10 * step + rank))


def replica(transport):
    model = SmallNet()
    optimizer = recipes.build(
        "approach_e",
        model,
        lr=LR,
        transport=transport,
        rank=RANK,
        wire="float32",
        momentum=BETA,
        nesterov=False,
    )
    for step in range(STEPS):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        model.up.weight.grad = gradient(step, transport.rank)
        optimizer.step()
    state = optimizer.state[model.up.weight]
    return model.up.weight.detach(), state["exchange"]["residual"], state["momentum"]["buffer"]


def test_approach_e_sends_the_nearest_matrix_of_its_rank_and_keeps_the_rest():
    results = lockstep(replica, 2)
    residuals, momentum = [torch.zeros(SHAPE)] * 2, torch.zeros(SHAPE)
    for step in range(STEPS):
        sent = []
        for rank in range(2):
            signal = residuals[rank] + gradient(step, rank)
            left, values, right = torch.linalg.svd(signal, full_matrices=False)
            sent.append(left[:, :RANK] * values[:RANK] @ right[:RANK])
            residuals[rank] = signal - sent[rank]
        momentum = BETA * momentum + (1 - BETA) * (sent[0] + sent[1]) / 2
    for (weight, kept, buffer), expected in zip(results, residuals, strict=True):
        # A few roundings of sums of numbers below 8, through two factorizations.
        assert torch.allclose(kept, expected, atol=2**-16)
        assert torch.allclose(buffer, momentum, atol=2**-16)
        assert torch.equal(weight, results[0][0])
