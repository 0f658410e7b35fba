"""Seeded and stateful codecs between real processes."""

import torch

from muonwire import codec, stages
from muonwire.optim import ChainOptimizer
from muonwire.transport import ProcessGroupTransport
from tests.codec.test_codecs import made
from tests.replicas import run_replicas

TEXTS = [
    "hadamard(block=64) | randomk(k=6) | bfloat16",
    "hadamard(block=64) | sign(scale=chunk)",
    "projection(density=0.1) | bfloat16",
    "lowrank(rank=2) | bfloat16",
    "randomk(density=0.1) | float32",
    "toprows(density=0.1) | bfloat16",
    "turns(parts=2) | sign(scale=tensor)",
    "nm(n=1, m=8) | sign(scale=tensor)",
]
SHAPES = [(24, 40), (13, 17)]
REPLICAS, STEPS = 2, 6


def gradient(rank, step, i):
    return made(SHAPES[i], seed=1000 * rank + 10 * step + i)


def _exchange_gradients():
    """Weights, which start at zero, and residuals after a few steps at rate 1, for every codec."""
    transport = ProcessGroupTransport()
    results = []
    for text in TEXTS:
        weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        stage = stages.Exchange(codec=codec.parse(text), feedback=stages.EF14())
        optimizer = ChainOptimizer(weights, chain=stage, lr=1.0, transport=transport)
        for step in range(STEPS):
            for i, weight in enumerate(weights):
                weight.grad = gradient(transport.rank, step, i)
            optimizer.step()
        results.append([(w.detach(), optimizer.state[w]["exchange"]["residual"]) for w in weights])
    return results


def test_replicas_agree_to_the_last_bit_and_lose_nothing():
    """With feedback, what moved the weights and the mean of what is kept add up to the mean of all gradients."""
    by_rank = run_replicas(_exchange_gradients, REPLICAS)
    for text, *results in zip(TEXTS, *by_rank, strict=True):
        for i, shape in enumerate(SHAPES):
            weights, residuals = zip(*(result[i] for result in results), strict=True)
            assert torch.equal(weights[0], weights[1]), (text, shape)
            assert not torch.equal(residuals[0], residuals[1]), (text, shape)
            moved, kept = -weights[0].double(), torch.stack(residuals).double().mean(0)
            given = sum(gradient(r, s, i).double() for r in range(REPLICAS) for s in range(STEPS)) / REPLICAS
            # A step rounds at most ten times (sums of residual, mean and weight; two rotations of log2 64 levels are the
            # rest), each time numbers whose norm is below that of all gradients together.
            roundings = (10 + 2 * 8) * STEPS
            sizes = sum(gradient(r, s, i).norm() for r in range(REPLICAS) for s in range(STEPS))
            error = (moved + kept - given).norm()
            assert error <= roundings * torch.finfo(torch.float32).eps * sizes, (text, shape)
            # Had the residual been lost, far more would be missing.
            assert kept.norm() > 0.1 * given.norm(), (text, shape)
