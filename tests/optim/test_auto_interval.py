"""The formula of an interval that follows the link, and the record that gives it again."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonwire.errors import ExchangeError, UsageError
from muonwire.optim.auto_interval import (
    Figure,
    Spell,
    agreed,
    as_record,
    next_interval,
    read_record,
    typical,
)


def test_the_least_waiting_and_the_slowest_step_count():
    spells = [
        Spell(wait_us=900, own_us=4000, num_steps=4),
        # It waited for the slower one, too.
        Spell(wait_us=2500, own_us=2400, num_steps=4),
        # It has just come.
        Spell(),
    ]
    assert agreed([s.pack() for s in spells]) == Figure(wait_us=900, step_us=1000)
    assert agreed([Spell().pack()] * 2) is None
    with pytest.raises(ExchangeError, match="same muonwire"):
        agreed([Spell().pack(), b"short"])


def test_the_median_passes_over_one_spike():
    figures = [Figure(wait_us=w, step_us=s) for w, s in ((10, 500), (10_000, 7), (12, 400))]
    assert typical(figures) == Figure(wait_us=12, step_us=400)


@given(
    wait_us=st.integers(0, 10**9),
    step_us=st.integers(1, 10**8),
    interval=st.integers(1, 1000),
    share=st.floats(0.001, 0.9),
)
def test_every_change_is_damped_and_goes_towards_the_wanted_interval(wait_us, step_us, interval, share):
    figure, bounds = Figure(wait_us=wait_us, step_us=step_us), (1, 1000)
    found = next_interval(figure, interval=interval, share=share, bounds=bounds)
    assert max(3 * interval // 4, 1) <= found <= min(2 * interval, 1000)
    wanted = wait_us * (1 - Fraction(share)) / (Fraction(share) * step_us)
    if found > interval:
        assert wanted > interval
        # Reached, doubled, or at the bound.
        assert found - 1 < wanted
        assert found >= wanted or found in (2 * interval, 1000)
    elif found < interval:
        assert wanted <= found
    else:
        assert wanted <= interval or interval == 1000
    # With these figures it settles, and waiting then takes no more than the share.
    for _ in range(60):
        before, interval = interval, found
        found = next_interval(figure, interval=interval, share=share, bounds=bounds)
    assert found == interval == before
    assert wait_us <= share * (wait_us + found * step_us) * (1 + 1e-9) or found == 1000


def test_bounds_hold_whatever_was_measured():
    slow, fast = Figure(wait_us=10**9, step_us=1), Figure(wait_us=0, step_us=10**6)
    assert next_interval(slow, interval=100, share=0.05, bounds=(4, 128)) == 128
    assert next_interval(fast, interval=5, share=0.05, bounds=(4, 128)) == 4
    assert next_interval(fast, interval=4, share=0.05, bounds=(4, 128)) == 4


@pytest.mark.parametrize(
    "record",
    [
        [],
        [(1, 4)],
        [(0, 4), (0, 5)],
        [(0, 4), (9, 5), (3, 5)],
        [(0, 0)],
        [(0, 4.0)],
        [(0, 4, 5)],
        [3],
        [(0, True)],
    ],
)
def test_records_that_are_none_say_what_is_wanted(record):
    with pytest.raises(
        UsageError, match=r"pairs of a step and the interval .* such as \[\(0, 11\), \(33, 22\)\]"
    ):
        as_record(record)


def test_a_file_is_read_or_the_error_names_it(tmp_path):
    path = tmp_path / "intervals.json"
    with pytest.raises(
        UsageError, match=r"intervals.json', which is no record .*a number, 'auto', or the path"
    ):
        read_record(str(path))
    for text in ("{", "[]", "{}", '{"changes": [{"step": 0}]}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="which is no record of intervals"):
            read_record(str(path))
    path.write_text(
        json.dumps({"changes": [{"step": 0, "interval": 4}, {"step": 12, "interval": 8, "wait_us": 5}]})
    )
    assert read_record(str(path)) == ((0, 4), (12, 8))
