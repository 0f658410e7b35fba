"""DeMo and Psyche's DisTrO against their descriptions, step by step, on several replicas."""

import numpy as np
import pytest
import torch

from muonwire import codec, stages
from muonwire.codec import payload as payloads
from muonwire.optim import ChainOptimizer
from muonwire.recipes.demo_family import DistroSettings
from tests import oracles_demo as oracles
from tests.lockstep import lockstep

SHAPES = [(7, 13), (24, 40), (67, 10), (101,), (48,), (1,), (6, 5, 8), (3, 4, 5, 2)]
LR, DECAY, WEIGHT_DECAY, K, STEPS = 0.01, 0.9, 0.1, 3, 2


def demo(values, chunk):
    return stages.Exchange(
        codec=codec.parse(f"dct(chunk={chunk}) | topk(k={K}) | {values}"),
        feedback=stages.ResidualMomentum(decay=DECAY),
        over="senders",
    )


def psyche(chunk):
    return DistroSettings(lr=1.0, k=K, chunk=chunk, decay=DECAY).stage()


def made(shape, *key):
    seed = sum(n * 1009**i for i, n in enumerate(key))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def replica(transport, stage, dtype, shapes):
    """Weights and residuals after each step, as the optimizer has them, and the payload of each step."""
    sent = []
    gather = transport.gather
    transport.gather = lambda payload, purpose="update": (
        sent.append(payload) if purpose == "update" else None,
        gather(payload, purpose=purpose),
    )[1]
    params = [torch.nn.Parameter(made(s, 0, i).to(dtype)) for i, s in enumerate(shapes)]
    optimizer = ChainOptimizer(
        params,
        chain=stages.chain(stage, stages.Sign()),
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        transport=transport,
    )
    history = []
    for step in range(1, STEPS + 1):
        for i, param in enumerate(params):
            param.grad = made(param.shape, step, transport.rank, i).to(dtype)
        optimizer.step()
        residuals = [optimizer.state[p]["exchange"]["residual"].double().numpy().copy() for p in params]
        history.append(([p.detach().double().numpy().copy() for p in params], residuals))
    return history, sent


def selected(stage, body, shape):
    """The coefficients of one body: (chunk, index in the chunk) -> value."""
    (values, _), positions, _ = stage.codec._values(body, shape)
    num_blocks, block_numel = stage.codec.transform.grid(shape)
    positions = torch.arange(num_blocks * block_numel) if positions is None else positions
    return {divmod(int(p), block_numel): float(v) for p, v in zip(positions, values.double(), strict=True)}


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("name", ["demo", "psyche"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_step_is_the_described_one(name, dtype, chunk, replicas):
    signs_only = name == "psyche"
    values = "float64" if dtype == torch.float64 else "float32"
    stage = psyche(chunk) if signs_only else demo(values, chunk)
    results = lockstep(lambda transport: replica(transport, stage, dtype, SHAPES), replicas)
    compared = 0
    for i, shape in enumerate(SHAPES):
        unit = torch.finfo(dtype).eps / 2
        rounding = oracles.largest_rounding(shape, chunk=chunk, unit=unit)
        weight = made(shape, 0, i).double().numpy()
        deltas = [np.zeros(shape) for _ in range(replicas)]
        for step in range(1, STEPS + 1):
            gradients = [made(shape, step, rank, i).double().numpy() for rank in range(replicas)]
            want = oracles.step(
                weight,
                gradients,
                deltas,
                lr=LR,
                decay=DECAY,
                weight_decay=WEIGHT_DECAY,
                k=K,
                chunk=chunk,
                signs_only=signs_only,
            )
            bound = rounding * want.peak
            history_deltas = [history[step - 1][1][i] for history, _ in results]
            got = results[0][0][step - 1][0][i]
            for history, _ in results:
                assert np.array_equal(history[step - 1][0][i], got)
            if want.gap <= 2 * rounding:
                # Two coefficients nearer to each other than their rounding: either may be the last one sent.
                assert dtype == torch.float32
                weight, deltas = got, history_deltas
                continue
            for rank, (_, sent) in enumerate(results):
                entries = payloads.unpack(sent[step - 1])
                coefficients = selected(stage, entries[i].body, shape)
                expected = {
                    (number, n): c
                    for (r, number), chosen in want.sent.items()
                    if r == rank
                    for n, c in chosen.items()
                }
                assert coefficients.keys() == expected.keys()
                for at, coefficient in expected.items():
                    assert (coefficients[at] > 0) == (coefficient > 0)
                    if not signs_only:
                        assert abs(coefficients[at] - coefficient) <= bound
                assert np.abs(history_deltas[rank] - want.deltas[rank]).max() <= bound
            # A few cosines can add up to zero exactly (the odd ones in the middle of a chunk, ±1 against ±1), and a rounded zero
            # has any sign: the claim is for what is beyond the rounding. The mean of ±1 is transformed back in float32.
            update_unit = torch.finfo(torch.float32).eps / 2 if signs_only else unit
            update_rounding = oracles.largest_rounding(shape, chunk=chunk, unit=update_unit)
            clear = np.abs(want.update) > update_rounding * (np.linalg.norm(want.update) + want.peak)
            compared += clear.sum()
            if dtype == torch.float64:
                assert np.array_equal(got[clear], want.weight[clear])
            else:
                # p (1 − lr · wd) − lr · sign: the two constants, the product and the difference are rounded once each.
                slack = 4 * unit * (np.abs(weight) + LR)
                assert (np.abs(got - want.weight) <= slack)[clear].all()
            weight, deltas = got, history_deltas
    share = 0.95 if dtype == torch.float64 else 0.7
    assert compared >= share * STEPS * sum(np.prod(s) for s in SHAPES)


def test_the_oracle_counts_senders_and_not_replicas():
    """By hand: two replicas, one coefficient a chunk of one entry (a prime longer than the chunk), k = 1 of 1."""
    zeros = [np.zeros(3), np.zeros(3)]
    made_step = oracles.step(
        np.array([1.0, 1.0, 1.0]),
        [np.array([2.0, -4.0, 0.5]), np.array([2.0, 1.0, -0.5])],
        zeros,
        lr=0.5,
        decay=0.9,
        weight_decay=0.2,
        k=1,
        chunk=2,
        signs_only=False,
    )
    assert made_step.update.tolist() == [1.0, -0.75, 0.0]
    assert made_step.weight.tolist() == [0.9 - 0.5, 0.9 + 0.5, 0.9]
    assert [d.tolist() for d in made_step.deltas] == [[0.0] * 3] * 2
    # Of a chunk of four, (1, 0, 0, 0) goes to (½, …) and (0, 0, 0, 1) has other signs; each replica sends its largest.
    first, second = np.array([1.0, 1.0, 1.0, 1.0]), np.array([1.0, 1.0, -1.0, -1.0])
    made_step = oracles.step(
        np.zeros(4),
        [first, second],
        [np.zeros(4)] * 2,
        lr=1.0,
        decay=0.9,
        weight_decay=0.0,
        k=1,
        chunk=4,
        signs_only=False,
    )
    assert [list(chosen) for chosen in made_step.sent.values()] == [[0], [1]]
    # Nobody shares a coefficient, so nothing is halved: the constant part is the first replica's in full.
    assert made_step.update.mean() == pytest.approx(1.0)
