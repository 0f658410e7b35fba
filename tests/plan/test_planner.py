"""The lines of a plan: H by the share, times and money that add up, and what is refused."""

import pytest

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.plan import CANDIDATES, Candidate, Machine, Planner, Rates, Setting, read_model
from muonwire.plan.commands import in_python
from muonwire.plan.exchanges import exchanged
from muonwire.plan.processor import ProcessorCost

MODEL = read_model("3e6")
SLOW = Rates(up_mbit_s=10, down_mbit_s=100, latency_s=0.02)
FAST = Rates(up_mbit_s=1e6, down_mbit_s=1e6)


def machine(candidates, *, step_s=0.5, per_entry_s=0.0):
    costs = {
        exchanged(c.at(1.0, steps=1000), MODEL.module).key: ProcessorCost(
            per_entry_s=per_entry_s, per_tensor_s=0.0
        )
        for c in candidates
    }
    return Machine(compute_s=step_s - 0.1, optimizer_s={"polar": 0.1, "adam": 0.1, "plain": 0.1}, costs=costs)


def planned(candidates=CANDIDATES, *, rates=SLOW, per_entry_s=1e-9, **given):
    setting = Setting(**{"replicas": 4, "steps": 1000, "share": 0.05, **given})
    return Planner(setting, MODEL, rates, machine(candidates, per_entry_s=per_entry_s), in_python).lines(
        candidates
    )


def options_of(line):
    return recipes.parse_recipe(line.recipe)[1]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("recipe", ["one_bit_muon", "muloco", "sparseloco"])
def test_h_is_the_least_that_keeps_exchange_below_the_share(recipe, share):
    (line,) = planned([Candidate(recipe=recipe)], share=share)
    once_s, interval = line.link_s + line.processor_s, options_of(line)["interval"]
    assert line.fits
    assert once_s / (once_s + interval * line.step_s) <= share
    assert once_s / (once_s + (interval - 1) * line.step_s) > share


def test_a_growing_interval_fits_too():
    (line,) = planned([Candidate(recipe="one_bit_muon", growing=True)])
    assert line.fits
    assert 0.04 < line.share <= 0.05
    assert options_of(line)["interval"] < line.spacing


def test_times_bytes_and_money_add_up():
    for line in planned(price_per_gb=0.5):
        exchange_s = line.synchronizations * (line.link_s + line.processor_s)
        assert line.total_s == pytest.approx(1000 * line.step_s + exchange_s)
        assert line.share == pytest.approx(exchange_s / line.total_s)
        assert line.wait_s == pytest.approx(exchange_s / 1000)
        assert line.money == pytest.approx(0.5 * 4 * line.total_up_bytes / 1e9)
        assert f"recipes.{line.recipe.split('(')[0]}(model" in line.command


def test_what_fits_comes_first_and_then_what_costs_the_least_loss():
    lines = planned()
    keys = [(not line.fits, line.cost.expected) for line in lines]
    assert keys == sorted(keys)
    assert not next(line for line in lines if line.recipe == "muon").fits


def test_the_recommended_recipe_has_lines_at_half_and_twice_its_h():
    lines = [
        line for line in planned() if line.recipe.startswith("one_bit_muon") and "growth" not in line.recipe
    ]
    assert [line.fits for line in lines].count(False) == 1
    half, once, twice = sorted(options_of(line)["interval"] for line in lines)
    assert 2 * once == twice
    assert once - 1 <= 2 * half <= once + 1


def test_a_fast_link_needs_no_local_steps_and_h_never_passes_the_run():
    (line,) = planned([Candidate(recipe="one_bit_muon")], rates=FAST)
    assert options_of(line) == {"interval": 1}
    (line,) = planned([Candidate(recipe="diloco")], steps=20)
    assert options_of(line) == {"interval": 20}
    assert line.synchronizations == 1
    assert not line.fits


def test_the_processor_counts_as_exchange():
    (quick,) = planned([Candidate(recipe="one_bit_muon")], rates=FAST, per_entry_s=0.0)
    (busy,) = planned([Candidate(recipe="one_bit_muon")], rates=FAST, per_entry_s=1e-6)
    assert busy.processor_s == pytest.approx(3.0, rel=0.01)
    assert busy.spacing > 50 > quick.spacing


def test_a_given_interval_is_kept():
    (line,) = planned([Candidate(recipe="muloco(interval=7)")])
    assert line.recipe == "muloco(interval=7)"
    assert not line.fits


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replicas": 0}, "replicas is 0; at least 2 are needed"),
        ({"replicas": 1}, "replicas is 1; at least 2 are needed"),
        ({"steps": 0}, "steps is 0; it lies between 1 and"),
        ({"share": 0.0}, "share is 0.0; it lies between 0 and 1"),
        ({"share": 1.0}, "share is 1.0"),
        ({"share": float("nan")}, "share is nan"),
        ({"price_per_gb": -1.0}, "price_per_gb is -1.0"),
    ],
)
def test_settings_that_are_not_allowed_are_named(given, says):
    with pytest.raises(UsageError, match=says):
        Setting(**{"replicas": 4, "steps": 1000, "share": 0.05, **given})
