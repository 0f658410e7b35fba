"""Measures of matrices against known values and against the library’s own iteration."""

import math

import pytest
import torch

from muonwire.lab.measures.matrices import (
    condition,
    departure,
    fitted_power,
    in_turns,
    orthogonality_by_step,
    with_steps,
)
from muonwire.polar import SCHEDULES, polar
from muonwire.polar.quality import orthogonality_error


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (9, 9)])
def test_a_multiple_of_a_semi_orthogonal_matrix_has_no_departure(shape):
    q = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()).Q
    assert departure(3.0 * q[: shape[0], : shape[1]]) < 1e-7


def test_rank_one_and_zero_are_farthest_from_orthogonal():
    assert departure(torch.outer(torch.arange(1.0, 5.0), torch.ones(7))) == pytest.approx(
        math.sqrt(1 - 1 / 4)
    )
    assert departure(torch.zeros(4, 7)) == 1.0


def test_departure_is_the_orthogonality_error_at_the_best_scale():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1)).double()
    gram = x @ x.mT
    scales = torch.linspace(0.001, 0.5, 20_000, dtype=torch.float64)[:, None, None]
    errors = (scales * gram - torch.eye(6)).flatten(1).norm(dim=1) / math.sqrt(6)
    assert departure(x) == pytest.approx(float(errors.min()), rel=1e-4)


def test_condition_ends_where_float32_does():
    assert condition(torch.tensor([8.0, 2.0])) == 4.0
    assert condition(torch.tensor([8.0, 0.0])) == pytest.approx(1 / torch.finfo(torch.float32).eps)


def test_a_power_is_fitted():
    assert fitted_power([(x, 3 * x**-0.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(-0.5)


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
@pytest.mark.parametrize("name", ["taylor_cubic", "tuned", "cans"])
def test_the_error_by_step_is_that_of_the_iteration_cut_there(name, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonality_by_step(x, schedule=SCHEDULES[name], steps=7, dtype=torch.float64)
    for step, error in enumerate(found, 1):
        cut = polar(
            x.double(),
            method="newton_schulz",
            schedule=with_steps(SCHEDULES[name], step),
            dtype=torch.float64,
        )
        # Same polynomials in another order of operations; the slopes multiply rounding by at most 1e4.
        assert error == pytest.approx(orthogonality_error(cut), rel=1e-8)


def test_a_longer_schedule_repeats_its_last_step_and_a_shorter_one_is_cut():
    tuned = SCHEDULES["tuned"]
    assert with_steps(tuned, 7).coefficients == tuned.coefficients + tuned.coefficients[-1:] * 2
    assert with_steps(tuned, 2).coefficients == tuned.coefficients[:2]


def test_calls_take_turns():
    seen = [
        (turn, name)
        for turn, name, _, _ in in_turns({"a": lambda: torch.ones(1), "b": lambda: torch.ones(1)}, turns=2)
    ]
    assert seen == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
