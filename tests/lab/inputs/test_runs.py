"""Runs side by side, and the course of the learning rate."""

import pytest
import torch

from muonwire import recipes
from muonwire.lab.inputs.runs import rate_course, side_by_side


def squared(case):
    return case**2


@pytest.mark.parametrize("quick", [True, False])
def test_what_runs_give_comes_in_the_order_of_the_cases(quick, monkeypatch):
    # One process is enough, and each takes seconds to start.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert side_by_side(squared, [3, 1, 2], quick=quick) == [9, 1, 4]


def test_the_rate_rises_over_a_twentieth_and_falls_to_a_tenth():
    optimizer = recipes.build("sgd", torch.nn.Linear(2, 2), lr=0.5)
    set_rates = rate_course(optimizer, steps=40)
    seen = []
    for step in (1, 2, 21, 40):
        set_rates(step)
        seen.append({group["lr"] for group in optimizer.param_groups})
    assert [len(rates) for rates in seen] == [1] * 4
    assert [max(rates) for rates in seen] == pytest.approx([0.25, 0.5, 0.275, 0.05])
