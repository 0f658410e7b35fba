"""Whom an ill-conditioned layer slows, how steps are counted, and the pages with the derivations."""

import math
import re
from pathlib import Path

import pytest
import torch

from muonwire.lab.claims.top_down import ill_conditioned_weights
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.measures.chains import steps_to_target

DOCS = Path(__file__).parents[4] / "docs"


def test_a_layers_own_condition_does_not_slow_it_and_its_neighbours_do():
    below, _, own = ill_conditioned_weights.COURSES[:3]
    rates = torch.logspace(-4, 1, 6, base=2.0, dtype=torch.float64)
    made = {"rates": rates, "most": 60}
    for course, slowed in ((own, False), (below, True)):
        easy, hard = steps_to_target(course, (1.0, 10.0), generator=torch.Generator().manual_seed(0), **made)
        assert (hard > 2 * easy) == slowed


def test_steps_are_counted_to_where_the_slowest_start_ends():
    falling = [1.0 - 0.01 * i for i in range(60)]
    slow = [1.0 - 0.005 * i for i in range(60)]
    diverged = [1.0] * 5 + [math.nan] * 55
    needed = ill_conditioned_weights.steps_needed({0.0: [diverged, falling], 3.0: [slow, diverged]})
    assert needed[3.0] == 60
    # The smoothed target is slow's mean over its last ten, 0.7275, which falling's mean passes at half the slope.
    assert needed[0.0] == 33


@pytest.mark.parametrize("page", ["conditioning.md", "random_matrices.md"])
def test_the_derivations_name_claims_that_there_are(page):
    text = (DOCS / page).read_text()
    named = set(re.findall(r"muonwire lab run (\w+\.\d)", text))
    assert named
    assert named <= set(load_claims())
