"""What a recipe sends by formula is what it sends."""

from dataclasses import dataclass
from statistics import fmean

import pytest
import torch
from torch import nn

from muonwire import recipes
from muonwire.optim import ChainOptimizer
from muonwire.stages import Mean, TalkingStage, chain
from muonwire.transport import ProcessGroupTransport
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, train
from tests.replicas import run_replicas

SIZES = {"vocabulary": 32, "width": 64, "hidden": 128}
FRAME_BYTES = 16
# Steps after which a recipe's traffic repeats, where it is no interval of local steps.
PERIODS = {"approach_f": 10}


CASES = [(name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES] + VARIANTS


def _sent():
    """Bytes a step, by formula and measured, of each recipe."""
    found = []
    for name, options in CASES:
        transport = ProcessGroupTransport()
        model = SmallNet(**SIZES)
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        steps = PERIODS.get(name, optimizer.local.initial if optimizer.local else 2)
        formula = optimizer.estimate_bytes(replicas=2)
        train(model, optimizer, steps, rank=transport.rank, world_size=2)
        # What is in flight is counted once it has arrived.
        optimizer.state_dict()
        spent = transport.meter.by_purpose["update"]
        frames = spent.num_messages * FRAME_BYTES
        found.append((formula, (spent.sent_bytes - frames) / steps))
    return found


@pytest.fixture(scope="module")
def sent():
    return run_replicas(_sent, 2)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{n} {o}" for n, o in CASES])
def test_the_formula_is_what_two_replicas_send_on_average(index, sent):
    formula = sent[0][index][0]
    measured = fmean(by_rank[index][1] for by_rank in sent)
    # The lengths of index sets near their entropy, of payloads joined in one message, and of frames that wait for steady lengths
    # are what the formula leaves open.
    assert formula == pytest.approx(measured, rel=0.04)


def test_local_steps_divide_by_their_interval_and_one_replica_sends_nothing():
    model = SmallNet()
    every, rarely = (recipes.build("local_muon", model, lr=0.01, interval=h) for h in (1, 10))
    assert every.estimate_bytes(replicas=2) == pytest.approx(10 * rarely.estimate_bytes(replicas=2))
    assert every.estimate_bytes(replicas=1) == 0.0


def test_a_stage_without_a_formula_leaves_the_whole_open():
    @dataclass(frozen=True)
    class Unknown(TalkingStage):
        def rounds(self, updates, params, states, context):
            return list(updates)
            yield

    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = ChainOptimizer([weight], chain=chain(Mean(), Unknown()), lr=0.1)
    assert optimizer.estimate_bytes(replicas=2) is None
