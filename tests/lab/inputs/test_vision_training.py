"""Training of the small vision models: what a step reports, what a run comes to, how rates are tuned."""

import json
import math

import pytest
import torch

from muonwire.lab.inputs import vision_training
from muonwire.lab.inputs.vision_training import (
    DESCRIBED,
    METHODS,
    MUONFAST,
    RATE_FACTORS,
    WORST_LOSS,
    Outcome,
    make,
    train,
    training,
    tuned_rate,
    vision_task,
)


@pytest.fixture(scope="module")
def vit():
    return vision_task("vit", quick=True)


def test_a_step_tells_what_it_did_to_the_hidden_matrices(vit):
    steps = list(training(vit, METHODS["SGD"].recipe, lr=0.1, seed=0, steps=3))
    assert [s.number for s in steps] == [1, 2, 3]
    start = dict(vit.build_model(seed=0).named_parameters())
    first, second = steps[0], steps[1]
    assert not any("embed" in name or "classifier" in name for name in first.weights)
    assert len(first.weights) == 6
    for name, weight in first.weights.items():
        assert torch.equal(weight, start[name])
        assert torch.allclose(second.weights[name], weight + first.changes[name], atol=1e-7)
        # The first step of a heavy ball with Nesterov's look-ahead goes 1 + β = 1.9 times along the gradient.
        assert torch.allclose(first.changes[name], -0.19 * first.gradients[name], atol=1e-6)


def test_a_run_that_diverges_counts_as_the_worst(vit):
    outcome = train(vit, METHODS["SGD"].recipe, lr=1e30, seed=0, steps=4)
    assert outcome == Outcome(loss=WORST_LOSS, accuracy=0.1, decrease=0.0)
    assert vision_training.bounded(math.nan) == vision_training.bounded(1e9) == WORST_LOSS


def test_a_run_is_determined_by_its_seed(vit):
    runs = [train(vit, METHODS["Muon"].recipe, lr=0.01, seed=seed, steps=3) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_rate_with_the_lowest_loss_is_the_tuned_one_and_finished_runs_are_kept(tmp_path, monkeypatch):
    tried = []

    def made(task, recipe, *, lr, seed, steps):
        tried.append((recipe, lr, seed))
        return Outcome(loss=abs(math.log(lr / 1e-3)), accuracy=0.5, decrease=0.0)

    monkeypatch.setattr(vision_training, "train", made)
    monkeypatch.setattr(vision_training, "METHODS", {"Adam": METHODS["Adam"], "SGD": METHODS["SGD"]})
    monkeypatch.setattr(vision_training, "tuned_factors", lambda quick: RATE_FACTORS)
    make(tmp_path, quick=True)
    said = json.loads((tmp_path / "about.json").read_text())
    assert said["runs"] == len(tried) == 2 * 2 * len(RATE_FACTORS)
    assert {seed for _, _, seed in tried} == {vision_training.TUNING_SEED}
    assert tuned_rate(tmp_path, "vit", "Adam") == METHODS["Adam"].centre / 3
    assert tuned_rate(tmp_path, "resnet", "SGD") == METHODS["SGD"].centre / 9
    assert json.loads((tmp_path / "rates.json").read_text())["vit"].keys() == {"Adam", "SGD"}
    make(tmp_path, quick=True)
    assert len(tried) == said["runs"]


def test_every_method_is_tried_at_as_many_rates():
    assert len(set(RATE_FACTORS)) == 5
    assert math.prod(RATE_FACTORS) == pytest.approx(1)
    assert METHODS[DESCRIBED].centre == METHODS[MUONFAST].centre
