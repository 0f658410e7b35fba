"""The best odd polynomial for 1 on an interval: the building block of every generated schedule."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from muonwire.errors import UsageError

# The worst error shrinks as ((1 - l/u)/2)^k. Below this it is rounding, the levelled points cannot be told
# apart, and the Taylor polynomial is as good.
SMALLEST_ERROR = 1e-12
DEGREES = (3, 5, 7, 9)
Values = NDArray[np.float64]

# Odd Taylor polynomials of sign(x) at 1: x Σ binom(2j, j) 4^-j (1 - x²)^j, expanded in x.
_TAYLOR: dict[int, tuple[float, ...]] = {
    3: (1.5, -0.5),
    5: (1.875, -1.25, 0.375),
    7: (2.1875, -2.1875, 1.3125, -0.3125),
    9: (2.4609375, -3.28125, 2.953125, -1.40625, 0.2734375),
}


def minimax_odd(*, lower: float, upper: float, degree: int = 5) -> tuple[tuple[float, ...], float]:
    """Odd polynomial p of ``degree`` that minimizes max |1 − p(x)| on [lower, upper], and that maximum.

    p(x) = c₀ x + c₁ x³ + … is a Haar system on (0, ∞), so the best p is the one whose error takes its
    maximum with alternating sign at k + 1 points, k = (degree + 1)/2 (Chebyshev). Both ends are among them;
    the rest are the roots of p', found exactly at each exchange of the Remez iteration.

    Args:
        lower: left end, 0 < lower ≤ upper.
        upper: right end.
        degree: 3, 5, 7 or 9.

    Returns:
        (c₀, c₁, …), k numbers, and the worst error.

    Raises:
        UsageError: the interval or the degree is not as above.

    >>> coefficients, error = minimax_odd(lower=0.5, upper=1.0, degree=3)
    >>> [round(c, 4) for c in coefficients], round(error, 4)
    ([2.1328, -1.2187], 0.086)

    Source: Amsel et al., "The Polar Express", arXiv 2505.16932, section 3; Grishina et al., arXiv 2506.10935.
    """
    if degree not in DEGREES:
        raise UsageError(f"minimax_odd: degree is {degree!r}; allowed are {', '.join(map(str, DEGREES))}")
    if not 0 < lower <= upper < float("inf"):
        raise UsageError(f"minimax_odd: the interval is [{lower!r}, {upper!r}]; it takes 0 < lower <= upper")
    k = (degree + 1) // 2
    if ((1 - lower / upper) / 2) ** k <= SMALLEST_ERROR:
        center = (lower + upper) / 2
        taylor = tuple(c / center ** (2 * j + 1) for j, c in enumerate(_TAYLOR[degree]))
        ends = np.array([lower, upper])
        return taylor, float(np.abs(1 - evaluate(taylor, ends)).max())
    return _remez(lower / upper, k, upper)


def evaluate(coefficients: tuple[float, ...], x: Values) -> Values:
    """p(x) = c₀ x + c₁ x³ + … at each x."""
    square = x * x
    total = np.zeros_like(x)
    for c in reversed(coefficients):
        total = total * square + c
    return total * x


def extrema(coefficients: tuple[float, ...], lower: float, upper: float) -> Values:
    """Points of [lower, upper] where p' = 0, ascending."""
    points = _extrema(coefficients)
    return points[(points > lower) & (points < upper)]


# Searches for an interval ask for the same polynomial's again and again.
@lru_cache(maxsize=1024)
def _extrema(coefficients: tuple[float, ...]) -> Values:
    """Points of (0, ∞) where p' = 0, ascending."""
    derivative = [(2 * j + 1) * c for j, c in enumerate(coefficients)]
    squares = np.roots(derivative[::-1])
    real = squares.real[(np.abs(squares.imag) <= 1e-9 * np.abs(squares)) & (squares.real > 0)]
    return np.sort(np.sqrt(real))


def _remez(ratio: float, k: int, upper: float) -> tuple[tuple[float, ...], float]:
    # The Chebyshev points of [ratio, 1] crowd toward the left end as the extrema do when ratio is small.
    angles = np.pi * np.arange(k + 1) / k
    points = (1 + ratio) / 2 - (1 - ratio) / 2 * np.cos(angles)
    signs = (-1.0) ** np.arange(k + 1)
    solved = np.zeros(k + 1)
    error, last = 0.0, -1.0
    for _ in range(100):
        system = np.concatenate([points[:, None] ** (2 * np.arange(k) + 1), signs[:, None]], axis=1)
        solved = np.linalg.solve(system, np.ones(k + 1))
        inner = extrema(tuple(solved[:k]), ratio, 1.0)
        assert len(inner) == k - 1, (
            "the levelled polynomial alternates k + 1 times, so it has k - 1 extrema inside"
        )
        points = np.concatenate([[ratio], inner, [1.0]])
        error = float(np.abs(1 - evaluate(tuple(solved[:k]), points)).max())
        if abs(error - last) <= 1e-15:
            break
        last = error
    return tuple(float(c) / upper ** (2 * j + 1) for j, c in enumerate(solved[:k])), error
