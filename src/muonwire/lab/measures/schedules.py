"""Schedules of coefficients by what they do to singular values: errors, fixed points, orders of convergence, and fits."""

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor, linalg

from muonwire.lab.measures.matrices import fitted_power
from muonwire.polar import Schedule

Values = NDArray[np.float64]
# The grid and the form of the fit are modded-nanogpt's; see ``muonwire.polar.schedules.TUNED``.
GRID = np.concatenate([np.linspace(0, 1.1, 1024), np.linspace(0, 0.1, 512)])
# Lower and upper bounds of γ, l and r, for five steps.
BOUNDS = np.tile([0.1, 0.0, 0.0], 5), np.tile([6.0, 0.6, 0.5], 5)
# Errors that are rounding in double precision, and errors at which nothing has converged yet.
ROUNDING, BEGUN = 1e-13, 0.9


def of_steps(*steps: tuple[float, ...]) -> Schedule:
    """A schedule of these coefficients, for applying only."""
    return Schedule(name="steps", coefficients=steps, source="given")


def unit_values(x: Tensor) -> Values:
    """The singular values of X/‖X‖_F, falling, in float64."""
    values = linalg.svdvals(x.double())
    found: Values = (values / values.norm()).numpy()
    return found


def rms_error(s: Values) -> float:
    """‖QQᵀ − I‖_F/√n of a matrix with these singular values: the rms of 1 − s²."""
    return float(np.sqrt(np.mean((1 - s**2) ** 2)))


def fixed_points(step: tuple[float, ...]) -> tuple[float, float]:
    """The two positive x with p(x) = x, ascending; NaN where they are not real."""
    squares = np.sort_complex(np.roots([step[2], step[1], step[0] - 1]))
    if np.any(np.abs(squares.imag) > 1e-9) or np.any(squares.real <= 0):
        return float("nan"), float("nan")
    return float(np.sqrt(squares[0].real)), float(np.sqrt(squares[1].real))


def fitted_order(errors: Values) -> float:
    """q of e_{k+1} ≈ C e_k^q, by least squares over the logarithms of consecutive errors.

    Args:
        errors: by iteration; those up to the last of 0.9 or more are left out, and those that are rounding.

    Returns:
        the order; NaN where fewer than three errors are left.
    """
    high = np.flatnonzero(errors >= BEGUN)
    kept = errors[high[-1] + 1 if len(high) else 0 :]
    kept = kept[kept > ROUNDING]
    return fitted_power(list(itertools.pairwise(kept))) if len(kept) >= 3 else math.nan


def fit(near: Schedule, *, noise: Values, most_evaluations: int) -> tuple[Schedule, float]:
    """Five steps by least squares of p(x) − 1 over the grid, from steps near a schedule's; and the rms there.

    Args:
        near: five steps, each with two fixed points.
        noise: fifteen standard normal numbers that move the start away from it.
        most_evaluations: of the sum of squares.
    """
    begun = []
    for step in near.coefficients:
        low, high = fixed_points(step)
        begun.append((step[2], 1 - low, high - 1))
    start = np.array(begun).ravel() * (1 + 0.03 * noise)
    start = np.clip(start, BOUNDS[0] + 1e-3, BOUNDS[1] - 1e-3)
    found = least_squares(_residuals, start, bounds=BOUNDS, max_nfev=most_evaluations)
    steps = tuple((float(a), float(b), float(c)) for a, b, c in _form(found.x))
    return of_steps(*steps), float(np.sqrt(np.mean(found.fun**2)))


def _form(parameters: Values) -> Values:
    # p(x) = x + γ x (x² − (1 + r)²)(x² − (1 − l)²): what is at 1 − l and at 1 + r stays there.
    gamma, left, right = parameters.reshape(-1, 3).T
    low, high = (1 - left) ** 2, (1 + right) ** 2
    return np.stack([1 + gamma * high * low, -gamma * (high + low), gamma], axis=1)


def _residuals(parameters: Values) -> Values:
    x = GRID
    for a, b, c in _form(parameters):
        # Five powers of five overflow from a poor start; no value of a schedule worth finding is past 2.
        x = np.clip(x * (a + x * x * (b + x * x * c)), -2.0, 2.0)
    return np.asarray(x - 1)
