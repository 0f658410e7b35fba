"""The error by iteration is that of the library's own iteration, cut after each step."""

import pytest
import torch

from muonwire.lab.measures.matrices import orthogonality_by_step, with_steps
from muonwire.polar import SCHEDULES, polar
from muonwire.polar.quality import orthogonality_error


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
