"""Choosing a schedule: candidates, their errors on a grid of singular values, and their products."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from muonwire.polar.minimax import Values
from muonwire.polar.products import gram_flops
from muonwire.polar.restarts import SUMMATION, TOLERANCE, derive_restarts
from muonwire.polar.schedules import Schedule, mixed
from muonwire.polar.spectrum import Spectrum

# Degrees worth trying: of all sequences of 3 and 5 these are the ones on the front of products against error
# for flat, square Gaussian, 1/k and log-normal spectra. Degree 7 has coefficients up to 130 that cancel,
# which bfloat16 shows.
DEGREES: tuple[tuple[int, ...], ...] = (
    (3,), (5,), (3, 3), (3, 5), (5, 5), (3, 3, 5), (3, 5, 5), (5, 5, 5), (3, 3, 5, 5), (3, 5, 5, 5), (5,) * 4,
    (3, 3, 5, 5, 5), (3, *(5,) * 4), (5,) * 5, (3, *(5,) * 5), (5,) * 6, (5,) * 7,
)  # fmt: skip
# The grid of l: half octaves from 0.71 to 2.4e-4.
LOWERS = tuple(2.0 ** (-j / 2) for j in range(1, 25))
# Edges of the cells on which errors are averaged, relative to σ_max: an eighth of an octave or less each.
EDGES = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, 192)])
CENTERS = np.sqrt(np.maximum(EDGES[:-1], 3e-5) * EDGES[1:])
# The longest row of R over λ_max is rounded up to one of these for the rounding model.
SPREADS = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.015)
# Noise is never grown past this. A direction that is only noise (a zero singular value) would else end as an
# orthonormal one; what lies within a factor of ten of the noise stays short of 1 instead.
NOISE_LIMIT = 0.1
# A singular value this many times the noise is not noise.
CLEAR_OF_NOISE = 4.0
# No singular value inside the interval that a schedule was made for comes out further off than this:
# what can be seen clearly is not given up for a tail that cannot.
WORST_LIMIT = 0.25
# Requests under this call for restarts at a tenth of the usual rounding error.
FINE_ERROR = 0.01


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run on one matrix, and what it should give.

    Args:
        schedule: the coefficients.
        restarts: steps before which the Gram form restarts; all of them for the plain iteration.
        scale: σ_max's estimate, by which singular values are divided.
        flops: FLOPs of the matrix products.
        expected_error: polar error expected on the measured spectrum, rounding included.
        worst_error: certified: the polar error if every singular value lies in [lower · scale, scale], in
            exact arithmetic.
        covered: fraction of the measured spectrum in that interval.
    """

    schedule: Schedule
    restarts: tuple[int, ...]
    scale: float
    flops: int
    expected_error: float
    worst_error: float
    covered: float


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The table for one dtype and one spread (see Spectrum): squared errors per candidate and cell of singular values."""

    schedules: tuple[Schedule, ...]
    restarts: tuple[tuple[int, ...], ...]
    squared_errors: Values
    squared_values: Values
    slopes: Values
    worst_errors: Values

    def grown(self, x: float) -> Values:
        """The most that each candidate makes of a singular value up to x ≤ 1, to within a cell."""
        if x < EDGES[1]:
            return self.slopes * x
        cells = min(int(np.searchsorted(EDGES, x)), len(CENTERS))
        most: Values = np.sqrt(self.squared_values[:, :cells].max(axis=1))
        return most


@lru_cache(maxsize=1)
def _schedules() -> tuple[Schedule, ...]:
    return tuple(mixed(lower=lower, degrees=degrees) for degrees in DEGREES for lower in LOWERS)


@lru_cache(maxsize=32)
def candidates(roundoff: float, spread: float, tolerance: float) -> Candidates:
    """Every schedule with the restarts that this dtype and spread need, and its squared error on each cell.

    Args:
        roundoff: unit roundoff.
        spread: largest norm of a row of R, over λ_max.
        tolerance: relative rounding error that calls for a restart; 0 for the plain iteration.
    """
    schedules = _schedules()
    restarts, errors, grown = [], [], []
    for schedule in schedules:
        assert schedule.lower is not None
        # Below the interval that it was made for, a schedule only grows what it finds, noise or not.
        matter = CENTERS[schedule.lower <= CENTERS]
        rounding = derive_restarts(schedule, matter, roundoff=roundoff, spread=spread, tolerance=tolerance)
        noise = np.concatenate([np.zeros(len(CENTERS) - len(matter)), np.minimum(rounding.error, 1.0)])
        restarts.append(rounding.restarts)
        mapped = schedule.apply(CENTERS)
        errors.append((1 - mapped) ** 2 + noise**2)
        grown.append(mapped**2)
    return Candidates(
        schedules=schedules,
        restarts=tuple(restarts),
        squared_errors=np.array(errors),
        squared_values=np.array(grown),
        slopes=np.array([s.slope for s in schedules]),
        worst_errors=np.array([s.worst_error(s.lower or 1.0) for s in schedules]),
    )


def plain_is_cheaper(shape: tuple[int, int]) -> bool:
    """Whether restarting before every step costs no more than going on: 2 r² s against three products of r×r.

    >>> plain_is_cheaper((512, 512)), plain_is_cheaper((512, 1024))
    (True, False)
    """
    return 2 * max(shape) <= 3 * min(shape)


@lru_cache(maxsize=256)
def _flops(
    roundoff: float, spread: float, tolerance: float, m: int, n: int, blocks: bool
) -> NDArray[np.int64]:
    table = candidates(roundoff, spread, tolerance)
    pairs = zip(table.schedules, table.restarts, strict=True)
    return np.array([gram_flops(s, m, n, restarts=at, blocks=blocks) for s, at in pairs], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """What rounding the entries of X leaves of its small singular values.

    Independent errors of standard deviation s = 0.41 u ‖X‖_F/√(mn) have singular values about ν = s √max(m,
    n). To first order they turn the polar factor's part at σ by ν/σ; below ν there is only noise, which no
    method can tell from the zeros of a rank-deficient matrix, and which the iteration had better not grow.

    Args:
        resolved: 1 for each cell above ν, else 0.
        squared_turn: min(1, ν/σ)² for each cell.
    """

    resolved: Values
    squared_turn: Values

    def squared_error(self, mapped: Values) -> Values:
        """Per cell, for singular values mapped to ``mapped``."""
        return (1 - mapped) ** 2 * self.resolved + mapped**2 * self.squared_turn

    def error(self, mass: Values, mapped: Values) -> float:
        """Polar error of a spectrum ``mass`` whose values are mapped to ``mapped``, over what is resolved of it."""
        return float(np.sqrt(mass @ self.squared_error(mapped) / max(float(mass @ self.resolved), 1e-12)))

    def floor(self, mass: Values) -> float:
        """Polar error that exact arithmetic after the rounding would leave."""
        return float(
            np.sqrt((mass * self.resolved) @ self.squared_turn / max(float(mass @ self.resolved), 1e-12))
        )


def resolution(values: Values, *, noise: float) -> Resolution:
    """What is left of singular values ``values`` under noise whose singular values are about ``noise``."""
    turn = np.minimum(1.0, (noise / np.maximum(values, 1e-300)) ** 2)
    return Resolution(resolved=(turn < 1).astype(np.float64), squared_turn=turn)


def rounding_noise(*, frobenius: float, shape: tuple[int, int], roundoff: float) -> float:
    """Singular values ν of the errors of rounding a matrix's entries: 0.41 u ‖X‖_F/√min(m, n).

    A dtype of 16 bits is summed in float32, and rounding the result is all there is. A wider one is summed
    in itself, which multiplies the error.

    >>> rounding_noise(frobenius=10.0, shape=(100, 400), roundoff=2**-8)
    0.0016015625
    """
    summed = 1.0 if roundoff > 1e-5 else SUMMATION
    return 0.41 * summed * roundoff * frobenius / math.sqrt(min(shape))


def choose_plan(
    spectrum: Spectrum,
    *,
    shape: tuple[int, int],
    error: float,
    roundoff: float,
    noise: float,
    blocks: bool = False,
    max_flops: int | None = None,
) -> Plan:
    """The plan of fewest FLOPs expected to reach ``error``; the most accurate one where none is.

    Args:
        spectrum: the measured one.
        shape: (m, n).
        error: requested polar error.
        roundoff: unit roundoff of the dtype of the products.
        noise: singular values below this are rounding errors.
        blocks: Gram matrices are made by blocks.
        max_flops: never spend more than this. Default: no limit.
    """
    top = spectrum.upper**2 or 1.0
    spread = spectrum.spread / top
    level = min((s for s in SPREADS if s >= spread), default=1.0)
    tolerance = 0.0 if plain_is_cheaper(shape) else TOLERANCE if error >= FINE_ERROR else TOLERANCE / 10
    table = candidates(roundoff, level, tolerance)
    mass = spectrum.mass(EDGES)
    seen = resolution(CENTERS * spectrum.upper, noise=noise)
    counted = max(float(mass @ seen.resolved), 1e-12)
    squares = table.squared_errors @ (mass * seen.resolved) + table.squared_values @ (
        mass * seen.squared_turn
    )
    errors = np.sqrt(squares / counted)
    flops = _flops(roundoff, level, tolerance, *shape, blocks)
    allowed = flops <= max_flops if max_flops is not None else np.ones_like(flops, dtype=bool)
    grown = table.grown(min(noise / (spectrum.upper or 1.0), 1.0))
    if not allowed.any():
        allowed = flops == flops.min()
    # The more directions are only noise, the less each may grow.
    visible = float(mass @ (CENTERS * spectrum.upper > CLEAR_OF_NOISE * noise))
    limit = NOISE_LIMIT * min(1.0, math.sqrt(visible / max(1 - visible, 1e-9)))
    allowed &= grown <= max(limit, 1.2 * float(grown[allowed].min()))
    bounded = allowed & (table.worst_errors <= WORST_LIMIT)
    allowed = bounded if bounded.any() else allowed
    good = allowed & (errors <= error)
    if good.any():
        cheapest = good & (flops == flops[good].min())
    else:
        # Within a fiftieth of the best, products decide.
        near = allowed & (errors <= 1.02 * errors[allowed].min())
        cheapest = near & (flops == flops[near].min())
    index = int(np.flatnonzero(cheapest)[errors[cheapest].argmin()])
    schedule = table.schedules[index]
    assert schedule.lower is not None
    return Plan(
        schedule=schedule,
        restarts=table.restarts[index],
        scale=spectrum.upper or 1.0,
        flops=int(flops[index]),
        expected_error=float(errors[index]),
        worst_error=float(table.worst_errors[index]),
        covered=float(mass[EDGES[:-1] >= schedule.lower].sum()),
    )
