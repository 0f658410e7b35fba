"""What schedules do to singular values, against cases with known answers."""

import math

import numpy as np
import pytest
import torch

from muonwire.lab.measures.schedules import (
    fit,
    fitted_order,
    fixed_points,
    of_steps,
    rms_error,
    unit_values,
)
from muonwire.polar.quality import orthogonality_error
from muonwire.polar.schedules import JORDAN, TUNED


def test_the_error_of_values_is_that_of_the_matrix():
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    assert rms_error(unit_values(x)) == pytest.approx(orthogonality_error(x.double() / x.double().norm()))


def test_fixed_points_stay_in_place():
    # p(x) = x + x (x² − 1/4)(x² − 4) leaves 1/2 and 2 where they are.
    step = (2.0, -4.25, 1.0)
    assert fixed_points(step) == pytest.approx((0.5, 2.0))
    assert of_steps(step).apply(np.array([0.5, 2.0])) == pytest.approx([0.5, 2.0])
    assert all(map(math.isnan, fixed_points((2.0, 0.0, 1.0))))


def test_the_order_of_a_known_sequence_is_found():
    errors = [0.99, 0.5]
    while len(errors) < 8:
        errors.append(0.7 * errors[-1] ** 2)
    assert fitted_order(np.array(errors)) == pytest.approx(2.0)
    assert math.isnan(fitted_order(np.array([0.99, 0.95, 0.5, 0.1])))


def test_a_fit_is_no_worse_than_its_start():
    noise = np.zeros(15)
    (_, barely), (fitted, well) = (fit(TUNED, noise=noise, most_evaluations=n) for n in (1, 30))
    assert well <= barely
    assert len(fitted) == len(JORDAN) == 5
