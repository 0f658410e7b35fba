"""Straight pieces between points."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Straight pieces between points, which lie in the order of x; beyond the ends they go on.

    >>> curve = Curve(points=[(0.0, 1.0), (2.0, 2.0)])
    >>> curve.at(1.0), curve.at(4.0), curve.is_outside(4.0)
    (1.5, 3.0, True)
    """

    points: Sequence[tuple[float, float]]

    def slope(self, x: float) -> float:
        """Of the piece at x, or of the nearest one; 0 with one point."""
        if len(self.points) < 2:
            return 0.0
        i = min(max(bisect.bisect_right([p[0] for p in self.points], x), 1), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[i - 1], self.points[i]
        return (y1 - y0) / (x1 - x0)

    def at(self, x: float) -> float:
        """The height at x."""
        nearest = min(self.points, key=lambda p: abs(p[0] - x))
        return nearest[1] + self.slope(x) * (x - nearest[0])

    def around(self, x: float) -> tuple[float, float]:
        """The heights of the points on both sides of x, which lies between the ends."""
        i = min(max(bisect.bisect_right([p[0] for p in self.points], x), 1), len(self.points) - 1)
        return self.points[i - 1][1], self.points[min(i, len(self.points) - 1)][1]

    def is_outside(self, x: float) -> bool:
        """Whether x lies beyond the ends."""
        return not self.points[0][0] - 1e-6 <= x <= self.points[-1][0] + 1e-6

    def distance(self, x: float) -> float:
        """To the nearest point."""
        return min(abs(p[0] - x) for p in self.points)


def between(values: Sequence[float]) -> str:
    """The ends of some numbers, in words.

    >>> between([4, 2, 8]), between([1500])
    ('2 to 8', '1,500')
    """
    low, high = min(values), max(values)
    return f"{low:,.12g}" if low == high else f"{low:,.12g} to {high:,.12g}"
