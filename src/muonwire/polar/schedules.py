"""Schedules: the coefficients of an iterative polar method, the published ones by name, and solvers that make others."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from muonwire.errors import UsageError
from muonwire.polar.minimax import Values, evaluate, extrema, minimax_odd

Step = tuple[float, ...]
# Degrees that the solvers make.
DEGREES = (3, 5, 7)
# A lower end past this counts as this.
NARROWEST = 1 - 1e-7


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Coefficients of an iterative polar method, one tuple (c₀, c₁, …) per iteration.

    Iteration: X ← (c₀ I + c₁ A + c₂ A² + …) X with A = X Xᵀ, which maps each singular value x to
    c₀ x + c₁ x³ + c₂ x⁵ + …

    Args:
        name: how the command line and reports call it.
        coefficients: one tuple of two to four numbers per iteration: degrees 3, 5 and 7.
        source: where the figures were published or how they were derived.
        lower: the left end of the interval [lower, 1] that it was made for; None where it was made for none.

    Raises:
        UsageError: no iteration, or one of another degree or with a coefficient that is not finite.

    >>> quintic = Schedule(name="taylor", coefficients=((1.875, -1.25, 0.375),) * 5, source="Higham (2008)")
    >>> quintic(1.0), round(quintic.slope, 2), len(quintic)
    (1.0, 23.17, 5)
    """

    name: str
    coefficients: tuple[Step, ...]
    source: str
    lower: float | None = None

    def __post_init__(self) -> None:
        lengths = {len(step) for step in self.coefficients}
        if not self.coefficients or not lengths <= {2, 3, 4}:
            raise UsageError(
                f"Schedule: coefficients have {sorted(lengths)} numbers per iteration in {len(self.coefficients)} iterations; it "
                f"takes at least one iteration of two to four numbers, for degrees 3, 5 and 7"
            )
        if not all(np.isfinite(c) for step in self.coefficients for c in step):
            raise UsageError(f"Schedule: coefficients of {self.name!r} are not all finite")

    def __len__(self) -> int:
        return len(self.coefficients)

    def __call__(self, x: float) -> float:
        """Map one singular value through all iterations."""
        return float(self.apply(np.array([x]))[0])

    def apply(self, x: Values) -> Values:
        """Map singular values, of any shape, through all iterations."""
        for step in self.coefficients:
            x = evaluate(step, x)
        return x

    @property
    def slope(self) -> float:
        """Derivative at 0, ∏ c₀: how much the smallest singular values, and noise, grow."""
        return float(np.prod([step[0] for step in self.coefficients]))

    def range(self, lower: float, upper: float = 1.0) -> tuple[float, float]:
        """Smallest and largest value on [lower, upper]: every iteration's extrema and ends are followed.

        >>> Schedule(name="cubic", coefficients=((1.5, -0.5),), source="Higham (2008)").range(0.0, 1.0)
        (0.0, 1.0)
        """
        if not 0 <= lower <= upper:
            raise UsageError(f"Schedule.range: [{lower!r}, {upper!r}] is not an interval of [0, ∞)")
        low, high = lower, upper
        for step in self.coefficients:
            signed = evaluate(step, np.concatenate([[low, high], extrema(step, low, high)]))
            values = np.abs(signed)
            # Past a sign change the interval straddles 0; odd symmetry lets the rest go on with absolute
            # values.
            low = 0.0 if signed.min() < 0 < signed.max() else float(values.min())
            high = float(values.max())
        return low, high

    def worst_error(self, lower: float, upper: float = 1.0) -> float:
        """Largest |1 − p(x)| on [lower, upper]: bounds the polar error if all σ lie there.

        >>> cubic = Schedule(name="cubic", coefficients=((1.5, -0.5),) * 5, source="Higham (2008)")
        >>> round(cubic.worst_error(0.5), 6)
        1e-06
        """
        low, high = self.range(lower, upper)
        return max(1 - low, high - 1)

    def stable_interval(self) -> float:
        """Largest u such that every iterate of every x in [0, u] stays within [0, 2 √3], found by bisection.

        Beyond it a singular value that was scaled too large grows or changes sign instead of nearing 1.

        >>> cubic = Schedule(name="cubic", coefficients=((1.5, -0.5),) * 30, source="Higham (2008)")
        >>> round(cubic.stable_interval(), 3)
        1.732
        """
        low, high = 0.0, 8.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._stays(middle) else (low, middle)
        return low

    def _stays(self, upper: float) -> bool:
        for step in self.coefficients:
            values = evaluate(step, np.concatenate([[upper], extrema(step, 0.0, upper)]))
            if values.min() < 0 or values.max() > 2 * np.sqrt(3):
                return False
            upper = float(values.max())
        return True


JORDAN = Schedule(
    name="jordan",
    coefficients=((3.4445, -4.7750, 2.0315),) * 5,
    source="Keller Jordan's Muon (2024); the default of torch.optim.Muon",
)
TUNED = Schedule(
    name="tuned",
    coefficients=(
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    source="modded-nanogpt record 2025-02-14_OptCoeffs",
)
POLAR_EXPRESS = Schedule(
    name="polar_express",
    coefficients=(
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    source="arXiv 2505.16932, l=1e-3, 5 steps, cushion 0.02, safety 1.02, as used by modded-nanogpt and dion",
    lower=1e-3,
)
TAYLOR_CUBIC = Schedule(
    name="taylor_cubic",
    coefficients=((1.5, -0.5),) * 5,
    source="Higham, Functions of Matrices (2008), section 5.3: Newton-Schulz",
)
TAYLOR_QUINTIC = Schedule(
    name="taylor_quintic",
    coefficients=((1.875, -1.25, 0.375),) * 5,
    source="Higham, Functions of Matrices (2008), section 5.4: the Padé family's [2/0] member",
)
CANS = Schedule(
    name="cans",
    coefficients=(
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    source="arXiv 2506.10935; the minimax composition for lower=1e-3",
    lower=1e-3,
)
RELAXED_CUBIC = Schedule(
    name="relaxed_cubic",
    coefficients=(
        (3.3656576, -3.3420992),
        (2.5744352, -1.4957376),
        (2.5368962, -1.4312570),
        (2.4418906, -1.2764040),
        (2.2230472, -0.9630650),
    ),
    source="arXiv 2606.00371, cubic5; relaxed_cubic(lower=0.007, steps=5, overshoot=0.3)",
    lower=7e-3,
)

SCHEDULES = {
    s.name: s for s in (JORDAN, TUNED, POLAR_EXPRESS, TAYLOR_CUBIC, TAYLOR_QUINTIC, CANS, RELAXED_CUBIC)
}


def find(schedule: Schedule | str | None, *, operation: str) -> Schedule:
    """The schedule itself or the one of that name; ``polar_express`` for None.

    Args:
        schedule: a schedule, a name of ``SCHEDULES``, or None.
        operation: name of the caller, for the message.

    Raises:
        UsageError: no schedule has that name.

    >>> find("jordan", operation="polar").slope > 400
    True
    """
    if schedule is None:
        return POLAR_EXPRESS
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise UsageError(
            f"{operation}: schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}, or a Schedule, "
            "such as schedules.polar_express(lower=0.01, steps=4)"
        )
    return SCHEDULES[schedule]


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
