"""Ranges and ticks: axes that show the part of the data in which series differ."""

import math
from collections.abc import Sequence

# The share of a run, its first and steep descent, that need not be in view.
_DESCENT = 0.15
_MARGIN = 0.06


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where there is room.

    >>> log_ticks(3, 80)
    [5.0, 10.0, 20.0, 50.0]
    """
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3.2 else (1,)
    every = max(1, math.ceil(decades / 7))
    ticks = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        if power % every == 0:
            ticks += [float(f"{step}e{power}") for step in steps]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) >= 2 else [low, high]


def log_domain(values: Sequence[float], *, margin: float = 0.04) -> tuple[float, float]:
    """A logarithmic range around positive ``values``, ``margin`` of its length wider on each side."""
    low, high = min(values), max(values)
    # A single value still needs a range to lie in.
    room = max(math.log10(high / low), 0.5) * margin + (0.15 if high == low else 0.0)
    return low / 10**room, high * 10**room


def wants_log(values: Sequence[float]) -> bool:
    """Whether the last values of the curves lie too far apart for a linear axis."""
    positive = [value for value in values if value > 0]
    return len(positive) > 1 and max(positive) / min(positive) > 6


def focus_domain(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """The range of losses worth showing: one recipe that diverges must not flatten the others.

    low = the lowest loss; high = the smallest of
      * the highest loss of any curve after the first ``_DESCENT`` of the steps,
      * the lowest loss that a curve starts from,
      * with three curves or more, m + 3 max(m - low, 0.15 (start - low)), m the median of the last losses.

    Args:
        curves: by run, (step, loss) in the order of the steps; finite losses only.

    Returns:
        (low, high) with a small margin, or ``None`` without any loss.
    """
    curves = [curve for curve in curves if curve]
    if not curves:
        return None
    ends = sorted(curve[-1][1] for curve in curves)
    start = min(curve[0][1] for curve in curves)
    last = max(curve[-1][0] for curve in curves)
    low = min(loss for curve in curves for _, loss in curve)
    late = [loss for curve in curves for step, loss in curve if step >= _DESCENT * last]
    median = ends[len(ends) // 2]
    high = min(max(late, default=start), start)
    if len(curves) > 2:
        high = min(high, max(median + 3 * max(median - low, 0.15 * (start - low)), low))
    if high <= low:
        high = max(loss for curve in curves for _, loss in curve)
    room = _MARGIN * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room
