"""Where the Gram form must restart: the growth of rounding errors in R, followed step by step."""

from dataclasses import dataclass

import numpy as np

from muonwire.polar.minimax import Values, evaluate
from muonwire.polar.schedules import Schedule, Step

# A rounding to nearest has a root-mean-square relative error of 0.41 u. A symmetric matrix of independent
# errors has a spectral norm of at most about twice the largest norm of a row of their standard deviations
# (Bandeira and van Handel, arXiv 1408.6185; Wigner where all are equal), so R's error is 0.82 u times R's
# longest row.
WIGNER = 0.82
# Error of a float32 product over that of rounding its result, measured at inner dimensions of 512 to 2048. A
# dtype of 16 bits is summed in float32, and rounding the result is all there is.
SUMMATION = 12.0
# Relative error of a singular value, from rounding, that calls for a restart.
TOLERANCE = 0.1
# The same at zero: an eigenvalue that rounding made negative must not grow to where W is no longer W(0).
TOLERANCE_AT_ZERO = 0.3


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Where to restart, and the relative rounding error that is left at each singular value.

    Args:
        restarts: steps before which to restart.
        error: relative error per singular value asked about.
    """

    restarts: tuple[int, ...]
    error: Values


def _weight(step: Step, square: Values) -> tuple[Values, Values]:
    # W(λ) and W'(λ), for W(λ) = c₀ + c₁ λ + …
    value, slope = np.zeros_like(square), np.zeros_like(square)
    for c in reversed(step):
        slope = slope * square + value
        value = value * square + c
    return value, slope


def derive_restarts(
    schedule: Schedule, x: Values, *, roundoff: float, spread: float, tolerance: float = TOLERANCE
) -> Rounding:
    """The fewest restarts that keep the rounding error at every singular value in ``x`` below ``tolerance``.

    A Gram matrix made with unit roundoff u has eigenvalues off by δ = 0.82 u · max ‖R_i‖. A step maps λ to λ
    W(λ)², which multiplies δ by the map's derivative (c₀² near 0) and adds rounding of its own, while Q
    takes on the relative error |W'/W| δ. Just before that sum would pass the tolerance somewhere on ``x``, a
    restart makes R anew from the updated X; the sum of what the segments left is reported.

    Args:
        schedule: coefficients, for singular values at most 1.
        x: singular values that matter, in (0, 1].
        roundoff: unit roundoff of the dtype of the products.
        spread: largest norm of a row of X Xᵀ relative to its largest eigenvalue; 1 at most.
        tolerance: relative error; 0 restarts before every step.

    >>> from muonwire.polar.schedules import POLAR_EXPRESS
    >>> derive_restarts(POLAR_EXPRESS, np.geomspace(0.1, 1, 9), roundoff=2**-24, spread=0.5).restarts
    ()
    >>> derive_restarts(POLAR_EXPRESS, np.geomspace(1e-3, 1, 9), roundoff=2**-8, spread=0.5).restarts
    (1, 3)
    """
    error = WIGNER * roundoff * (SUMMATION if roundoff < 1e-5 else 1.0)
    values = np.concatenate([[0.0], np.asarray(x, dtype=np.float64)])
    limits = np.full_like(values, tolerance)
    limits[0] = TOLERANCE_AT_ZERO
    noise = np.full_like(values, error * spread)
    segment = np.zeros_like(values)
    settled = np.zeros_like(values)
    restarts: list[int] = []
    for index, step in enumerate(schedule.coefficients):
        weight, slope = _weight(step, values**2)
        added = np.abs(slope) * noise / np.maximum(np.abs(weight), 1e-6)
        # The first step is as exact as it can be; a restart before it would gain nothing.
        if index > 0 and (tolerance == 0 or bool(np.any(segment + added > limits))):
            restarts.append(index)
            # What the segment got wrong stays in X, but only its part in the singular value; the vectors are
            # X's own.
            settled = np.maximum(settled, segment)
            segment = np.zeros_like(values)
            noise = np.full_like(values, error * _rms(values))
            added = np.abs(slope) * noise / np.maximum(np.abs(weight), 1e-6)
        segment = segment + added
        mapped = np.abs(evaluate(step, values))
        derivative = np.abs(weight * (weight + 2 * values**2 * slope))
        noise = derivative * noise + error * _rms(mapped)
        values = mapped
    return Rounding(restarts=tuple(restarts), error=np.maximum(settled, segment)[1:])


def _rms(values: Values) -> float:
    return float(np.sqrt(np.mean(values**4)))
