import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire.errors import UsageError
from muonwire.polar import schedules
from muonwire.polar.minimax import evaluate, extrema, minimax_odd
from muonwire.polar.schedules import Schedule

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_schedules.json").read_text())
PAPER_CUSHION = 0.02407327424182761


def published(name):
    return np.array(PUBLISHED[name]["coefficients"])


def test_solver_reproduces_the_list_in_use_for_training():
    made = schedules.polar_express(lower=1e-3, steps=5, cushion=0.02, safety=1.02)
    np.testing.assert_allclose(made.coefficients, published("polar_express_speedrun"), rtol=1e-5)
    np.testing.assert_allclose(schedules.POLAR_EXPRESS.coefficients, made.coefficients, rtol=1e-10)


def test_solver_reproduces_the_paper():
    made = schedules.polar_express(lower=1e-3, steps=8, cushion=PAPER_CUSHION)
    np.testing.assert_allclose(made.coefficients[0], (8.287212, -23.595887, 17.300387), rtol=1e-6)
    np.testing.assert_allclose(made.coefficients[7], (1.875, -1.25, 0.375), rtol=1e-4)
    made = schedules.polar_express(
        lower=1e-3, steps=8, cushion=PAPER_CUSHION, safety=1.01, safety_inside=False
    )
    # The list is printed to four decimals, some of them cut off instead of rounded.
    np.testing.assert_allclose(made.coefficients, published("polar_express_101"), rtol=1e-5, atol=1e-4)


def test_cans_and_relaxed_cubic_reproduce_theirs():
    # Printed to four decimals.
    np.testing.assert_allclose(
        schedules.cans(lower=1e-3, steps=5).coefficients, published("cans"), rtol=1e-5, atol=5.1e-5
    )
    made = np.array(schedules.relaxed_cubic().coefficients)
    np.testing.assert_allclose(made, published("cubic5")[:, :2], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "key"),
    [("jordan", "jordan"), ("tuned", "tuned5"), ("taylor_cubic", "newton_schulz_cubic"), ("cans", "cans")],
)
def test_tables_are_the_published_ones(name, key):
    wanted = published(key)
    wanted = np.repeat(wanted, PUBLISHED[key].get("repeat", 1), axis=0)
    made = np.array(schedules.SCHEDULES[name].coefficients)
    np.testing.assert_array_equal(made, wanted[:, : made.shape[1]])
    assert not wanted[:, made.shape[1] :].any()


@pytest.mark.parametrize(
    ("name", "lower", "error"),
    [
        ("jordan", 1e-3, 0.529),
        ("tuned", 1e-3, 0.525),
        ("polar_express", 1e-3, 0.141),
        ("cans", 1e-3, 0.120),
        ("jordan", 1e-2, 0.318),
        ("tuned", 1e-2, 0.032),
    ],
)
def test_worst_errors(name, lower, error):
    schedule = schedules.SCHEDULES[name]
    grid = np.geomspace(lower, 1, 20001)
    on_grid = np.abs(1 - schedule.apply(grid)).max()
    assert on_grid == pytest.approx(error, abs=6e-4)
    # Following the range step by step allows for values that no single x takes one after another.
    assert schedule.worst_error(lower) >= on_grid - 1e-9


@settings(max_examples=40, deadline=None)
@given(lower=st.floats(1e-5, 0.98), upper=st.floats(0.1, 10), degree=st.sampled_from([3, 5, 7, 9]))
def test_minimax_alternates_and_is_no_worse_than_perturbed(lower, upper, degree):
    coefficients, error = minimax_odd(lower=lower * upper, upper=upper, degree=degree)
    points = np.concatenate([[lower * upper], extrema(coefficients, lower * upper, upper), [upper]])
    errors = 1 - evaluate(coefficients, points)
    k = (degree + 1) // 2
    if error > 1e-9:
        # Chebyshev's theorem: k + 1 alternations of equal size prove that nothing is better.
        assert len(points) == k + 1
        np.testing.assert_allclose(errors * (-1.0) ** np.arange(k + 1) * np.sign(errors[0]), error, rtol=1e-5)


def test_composition_beats_every_table_on_its_interval():
    for name, schedule in schedules.SCHEDULES.items():
        if len(schedule) == 5 and name != "relaxed_cubic":
            made = schedules.mixed(lower=1e-2, degrees=(5,) * 5, safety=1.0)
            assert made.worst_error(1e-2) < schedule.worst_error(1e-2)


def test_knowing_the_interval_pays():
    assert schedules.mixed(lower=1e-2, degrees=(5,) * 4, safety=1).worst_error(1e-2) == pytest.approx(
        0.013, abs=1e-3
    )
    assert schedules.mixed(lower=1e-2, degrees=(5,) * 5, safety=1).worst_error(1e-2) < 2e-6


@pytest.mark.parametrize("degree", [3, 5, 7])
def test_every_degree(degree):
    made = schedules.polar_express(lower=0.05, steps=4, degree=degree, cushion=0)
    assert {len(step) for step in made.coefficients} == {(degree + 1) // 2}
    assert made.worst_error(0.05) == pytest.approx(
        np.abs(1 - made.apply(np.geomspace(0.05, 1, 9999))).max(), rel=1e-3, abs=1e-12
    )


def test_stable_interval_and_slope():
    assert schedules.TAYLOR_CUBIC.stable_interval() > 1.7
    assert schedules.POLAR_EXPRESS.stable_interval() > 1.01
    assert schedules.JORDAN.slope == pytest.approx(3.4445**5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: schedules.polar_express(lower=0, steps=3),
        lambda: schedules.polar_express(lower=0.1, steps=0),
        lambda: schedules.polar_express(lower=0.1, steps=2, degree=4),
        lambda: schedules.polar_express(lower=0.1, steps=2, safety=0.9),
        lambda: schedules.relaxed_cubic(overshoot=-1),
        lambda: schedules.mixed(lower=0.1, degrees=(2,)),
        lambda: schedules.find("nope", operation="test"),
        lambda: minimax_odd(lower=1.0, upper=0.5),
        lambda: minimax_odd(lower=0.1, upper=0.5, degree=11),
        lambda: Schedule(name="empty", coefficients=(), source=""),
        lambda: Schedule(name="nan", coefficients=((float("nan"), 1.0),), source=""),
    ],
)
def test_bad_input_is_a_usage_error(call):
    with pytest.raises(UsageError):
        call()


@pytest.mark.parametrize("degree", [3, 5, 7])
@pytest.mark.parametrize(("lower", "cushion"), [(0.3, 0.0), (0.01, 0.02), (1e-4, 0.02), (0.01, 0.0)])
def test_steps_after_convergence_keep_one_fixed(degree, lower, cushion):
    made = schedules.polar_express(lower=lower, steps=30, degree=degree, cushion=cushion)
    values = np.linspace(lower, 1, 500)
    for step in made.coefficients:
        values = evaluate(step, values)
    assert np.abs(values - 1).max() < 1e-12
