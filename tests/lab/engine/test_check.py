"""Intervals, means by seed, checks that hold, fail or stay open, and how they read."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from muonwire.errors import UsageError
from muonwire.lab import Check, Interval
from muonwire.lab.engine.check import ANY, FAILS, HOLDS, MOST_SEEDS, OPEN, Reading, by_seed
from tests.lab.engine.toy import check


def test_the_interval_is_students():
    # t of 0.975 with two degrees of freedom is 4.3027.
    found = Interval.of([1.0, 2.0, 3.0])
    assert found.high - found.mean == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert Interval.of([5.0]) == Interval(mean=5.0, low=5.0, high=5.0, repeats=1)
    with pytest.raises(UsageError, match="no values"):
        Interval.of([])


def test_so_many_seeds_decide_in_four_of_five_measurements():
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 0.5, 2.5, 3.0]
    found = Interval.of(values)
    distance = 0.8
    count = found.repeats_to_leave(distance)
    spread = np.std(values, ddof=1)
    draws = np.random.default_rng(0).normal(0.0, spread, size=(20_000, count))
    reach = student.ppf(0.975, count - 1) * draws.std(1, ddof=1) / math.sqrt(count)
    share = np.mean(draws.mean(1) + reach < distance)
    assert 0.78 < share < 0.86
    fewer = count - 6
    reach = student.ppf(0.975, fewer - 1) * draws[:, :fewer].std(1, ddof=1) / math.sqrt(fewer)
    assert np.mean(draws[:, :fewer].mean(1) + reach < distance) < share - 0.05
    assert found.repeats_to_leave(1e-6) > MOST_SEEDS


def test_an_open_check_says_how_many_seeds_would_tell():
    reading = Reading(holds="it is large", fails="it is small")
    large = Check(setting="here", column="x", at_least=1.0, reading=reading)
    rows = [{"seed": i, "x": x} for i, x in enumerate((1.1, 2.5, 1.9, 0.8))]
    found = large.evaluate(rows)
    assert found.state == OPEN
    assert f"; about {found.seeds_to_decide} seeds would tell)" in found.place_and_seeds
    assert found.seeds_to_decide == found.interval.repeats_to_leave(found.interval.mean - 1.0) > 4
    assert large.evaluate([{"seed": i, "x": x} for i, x in enumerate((0.0, 2.0))]).place_and_seeds.endswith(
        "; more than 1,000 seeds would tell)"
    )
    # One that is decided says nothing of it.
    assert large.evaluate([{"seed": i, "x": 5.0 + i / 10} for i in range(4)]).seeds_to_decide is None


def test_by_seed_averages_within_a_seed_and_leaves_out_what_is_missing():
    rows = [
        {"seed": 1, "x": 1.0, "data": "a"},
        {"seed": 0, "x": 2.0, "data": "a"},
        {"seed": 0, "x": 4.0, "data": "a"},
        {"seed": 0, "x": 9.0, "data": "b"},
        {"seed": 2, "x": None, "data": "a"},
        {"seed": 3, "data": "a"},
    ]
    assert by_seed(rows, column="x", select={"data": "a"}) == [3.0, 1.0]


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ((1.5, 1.6, 1.5), HOLDS),
        ((0.1, 0.2, 0.1), FAILS),
        ((0.5, 1.5, 1.0), OPEN),
        ((), OPEN),
        ((1.2,), HOLDS),
    ],
)
def test_a_check_holds_where_its_whole_interval_does(values, state):
    rows = [{"seed": seed, "x": value} for seed, value in enumerate(values)]
    outcome = check().evaluate(rows)
    assert outcome.state == state
    assert (outcome.figure == "not measured") == (not values)


@pytest.mark.parametrize(
    "changes", [{"at_least": None}, {"at_least": 3.0}, {"at_least": -1.0}, {"at_least": 1.0, "at_most": 0.5}]
)
def test_a_check_that_can_tell_nothing_is_refused(changes):
    with pytest.raises(UsageError, match="x is large"):
        check(**changes)


@pytest.mark.parametrize(
    ("value", "by", "shown"),
    [
        (11_970.0, "{mean}", "12,000"),
        (-0.0499, "{mean}", "−0.050"),
        (-2.0, "{size}", "2.0"),
        (3.0, "{power}", "1,000"),
        (500.0, "{low} to {high}", "500 to 500"),
    ],
)
def test_figures_have_as_many_digits_as_a_reading_asks_for(value, by, shown):
    reading = Reading(holds="so", fails="so", by=by)
    one = Check(name="n", setting="s", column="x", at_least=0.0, reading=reading)
    assert one.evaluate([{"seed": 0, "x": value}]).clause == f"so ({shown})"


def test_a_check_without_a_name_states_its_clause_and_where_it_adds_to_the_setting():
    def named(**changes):
        reading = Reading(holds="it is large", fails="it is small", where="at sea")
        return Check(
            **{"setting": "here", "column": "x", "at_least": 1.0, "reading": reading, **changes}
        ).name

    assert named() == "it is large at sea"
    assert named(setting="at sea") == "it is large"
    assert named(name="x is large") == "x is large"
    with pytest.raises(UsageError, match="give a name, or a reading"):
        named(reading=None)


@pytest.mark.parametrize(
    ("unit", "possible"), [("times as fast", (0.0, math.inf)), ("% of the cases", (0.0, 100.0)), ("%", ANY)]
)
def test_what_is_possible_follows_from_the_unit(unit, possible):
    assert Check(name="n", setting="s", column="x", at_least=1.0, unit=unit).possible == possible
