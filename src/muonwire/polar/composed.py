"""Schedules as compositions of minimax polynomials: Polar Express, CANS, relaxed cubic, mixed."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from muonwire.errors import UsageError
from muonwire.polar.minimax import evaluate, minimax_odd
from muonwire.polar.schedule import Schedule, Step

DEGREES = (3, 5, 7)
# A lower end past this counts as this.
NARROWEST = 1 - 1e-7


def polar_express(
    *,
    lower: float,
    steps: int,
    degree: int = 5,
    cushion: float = 0.02,
    safety: float = 1.0,
    safety_inside: bool = True,
) -> Schedule:
    """Polar Express: at every iteration the minimax odd polynomial for where the singular values are by then.

    On [l, u], from u = 1: p = argmin max |1 − p|, then l ← p(l), u ← 2 − l. No other composition of as many
    polynomials of this degree has a smaller worst error on [lower, 1]. Two guards against rounding change
    that a little: the cushion solves on [max(l, cushion u), u], and where it bites scales p by 2/(p(l) +
    max p) so that its range is centered on 1 again; the safety factor s replaces p(x) by p(x/s) on all
    iterations but the last, so that a singular value up to s times too large does no harm.

    Args:
        lower: smallest singular value of interest when the largest is 1; 0 < lower < 1.
        steps: iterations, at least 1.
        degree: 3, 5 or 7 (1, 2 and 3 products besides the Gram matrix).
        cushion: ratio l/u below which p is solved for that ratio; 0 for none.
        safety: s ≥ 1.
        safety_inside: follow l through p(x/s) (as the lists in use for training were made) instead of
            through p (the paper's list, divided afterwards).

    Returns:
        the schedule, its ``lower`` set.

    Raises:
        UsageError: an argument is out of the range above.

    >>> schedule = polar_express(lower=1e-3, steps=5, cushion=0.02, safety=1.02)
    >>> [round(c, 6) for c in schedule.coefficients[0]]
    [8.156555, -22.483293, 15.87877]

    Source: Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932, theorem 3.1 and section
    4.4.
    """
    _check("polar_express", lower=lower, steps=steps)
    if degree not in DEGREES:
        raise UsageError(f"polar_express: degree is {degree!r}; allowed are 3, 5 and 7")
    if not 0 <= cushion < 1 or not safety >= 1:
        raise UsageError(
            f"polar_express: cushion {cushion!r}, safety {safety!r}; takes 0 <= cushion < 1 <= safety"
        )
    low, high = lower, 1.0
    steps_made: list[Step] = []
    for index in range(steps):
        start = max(low, cushion * high)
        step, error = minimax_odd(lower=start, upper=high, degree=degree)
        if start > low:
            # The largest value, 1 + error, lies at the upper end for degree 5 only.
            ends = float(evaluate(step, np.array([low]))[0]), 1 + error
            step = tuple(2 * c / sum(ends) for c in step)
        stretched = (
            step if index == steps - 1 else tuple(c / safety ** (2 * j + 1) for j, c in enumerate(step))
        )
        steps_made.append(stretched)
        low = float(evaluate(stretched if safety_inside else step, np.array([low]))[0])
        # Once all values are 1 to rounding there is no interval left to solve on.
        low = min(low, NARROWEST)
        high = 2 - low
    return Schedule(
        name=f"polar_express(lower={lower:g}, steps={steps}, degree={degree})",
        coefficients=tuple(steps_made),
        source="arXiv 2505.16932, solved",
        lower=lower,
    )


def cans(*, lower: float, steps: int, degree: int = 5) -> Schedule:
    """CANS: the minimax composition on [lower, 1] with neither cushion nor safety.

    Args:
        lower: as for ``polar_express``.
        steps: iterations.
        degree: 3, 5 or 7.

    Raises:
        UsageError: an argument is out of range.

    >>> [round(c, 4) for c in cans(lower=1e-3, steps=5).coefficients[4]]
    [2.2737, -1.6447, 0.4162]

    Source: Grishina, Smirnov and Rakhuba, "Chebyshev-accelerated Newton-Schulz", arXiv 2506.10935.
    """
    made = polar_express(lower=lower, steps=steps, degree=degree, cushion=0.0)
    name = f"cans(lower={lower:g}, steps={steps}, degree={degree})"
    return Schedule(name=name, coefficients=made.coefficients, source="arXiv 2506.10935, solved", lower=lower)


def relaxed_cubic(*, lower: float = 7e-3, steps: int = 5, overshoot: float = 0.3) -> Schedule:
    """Cubics that may overshoot 1: p(l) = p(u) is as large as a peak of 1 + overshoot allows.

    With s = u² + u l + l² and α = √(3/s): p(x) = (1 + overshoot)(1.5 α x − 0.5 α³ x³); then l ← p(l), u ← 1
    + overshoot. The result ends in [l, 1 + overshoot] instead of near 1,
    in exchange for a larger slope per product.

    Args:
        lower: smallest singular value of interest, 0 < lower < 1. Default: 0.007.
        steps: iterations. Default: 5.
        overshoot: how far above 1, at least 0. Default: 0.3.

    Raises:
        UsageError: an argument is out of range.

    >>> [round(c, 7) for c in relaxed_cubic().coefficients[0]]
    [3.3656576, -3.3420992]

    Source: arXiv 2606.00371, "cubic5"; the closed form is that of Chebyshev's cubic on [l, u].
    """
    _check("relaxed_cubic", lower=lower, steps=steps)
    if not overshoot >= 0:
        raise UsageError(f"relaxed_cubic: overshoot is {overshoot!r}; it must be at least 0")
    low, high, made = lower, 1.0, []
    for _ in range(steps):
        alpha = (3 / (high * high + high * low + low * low)) ** 0.5
        step = (1.5 * (1 + overshoot) * alpha, -0.5 * (1 + overshoot) * alpha**3)
        made.append(step)
        low, high = float(evaluate(step, np.array([low]))[0]), 1 + overshoot
    name = f"relaxed_cubic(lower={lower:g}, steps={steps}, overshoot={overshoot:g})"
    return Schedule(name=name, coefficients=tuple(made), source="arXiv 2606.00371, derived", lower=lower)


@lru_cache(maxsize=4096)
def _composition(lower: float, degrees: tuple[int, ...], safety: float) -> tuple[tuple[Step, ...], float]:
    if not degrees:
        return (), 1 - lower
    before, error = _composition(lower, degrees[:-1], safety)
    high = safety * (1 + error if before else 1.0)
    step, error = minimax_odd(lower=1 - error, upper=high, degree=degrees[-1])
    return (*before, step), error


def mixed(*, lower: float, degrees: Sequence[int], safety: float = 1.01) -> Schedule:
    """The minimax composition on [lower, 1] whose iterations have the given degrees.

    Every iteration is solved on [l, s u]: a singular value above u, because the largest was underestimated
    or because of rounding, is inside as long as it is less than s times too large. Without that margin the
    slope of p at u, which nears 27 for small l, carries it away.

    Args:
        lower: smallest singular value of interest, 0 < lower < 1.
        degrees: 3, 5 or 7 for each iteration.
        safety: s ≥ 1. Default: 1.01.

    Raises:
        UsageError: an argument is out of range.

    >>> schedule = mixed(lower=0.25, degrees=(3, 5), safety=1.0)
    >>> [len(step) for step in schedule.coefficients], round(schedule.worst_error(0.25), 4)
    ([2, 3], 0.0172)

    Source: as for ``polar_express``; that composing the best is best holds for any degrees (its theorem 3.1).
    """
    _check("mixed", lower=lower, steps=len(degrees))
    if not set(degrees) <= set(DEGREES) or not safety >= 1:
        raise UsageError(
            f"mixed: degrees {tuple(degrees)}, safety {safety!r}; takes degrees 3, 5, 7 and safety >= 1"
        )
    made, _ = _composition(lower, tuple(degrees), safety)
    name = f"minimax(lower={lower:.3g}, degrees={'-'.join(map(str, degrees))})"
    return Schedule(name=name, coefficients=made, source="solved for this interval", lower=lower)


def _check(name: str, *, lower: float, steps: int) -> None:
    if not 0 < lower < 1:
        raise UsageError(
            f"{name}: lower is {lower!r}; it takes 0 < lower < 1, relative to the largest singular value"
        )
    if steps < 1:
        raise UsageError(f"{name}: steps is {steps!r}; at least one iteration is needed")
