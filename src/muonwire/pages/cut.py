"""Lines cut off at the upper edge of a chart.

A clip path would do the same, but rasterizing one for each line takes seconds.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]


def cut_above(points: Sequence[Point], *, top: float, log: bool) -> list[list[Point]]:
    """The pieces of the line through ``points`` (x, y) that lie at or below ``top``.

    A piece that leaves the chart ends on its edge, where the straight line as drawn crosses it.

    Args:
        points: in the order of the line.
        top: the highest y to keep.
        log: whether x is drawn on a logarithmic axis.

    >>> cut_above([(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)], top=3.0, log=False)
    [[(0.5, 3.0), (1.0, 2.0), (2.0, 1.0)]]
    """
    pieces: list[list[Point]] = []
    last: Point | None = None
    for point in points:
        inside = point[1] <= top
        was_inside = last is not None and last[1] <= top
        if last is not None and inside != was_inside:
            crossing = _crossing(last, point, top=top, log=log)
            if inside:
                pieces.append([crossing])
            else:
                pieces[-1].append(crossing)
        elif inside and not was_inside:
            pieces.append([])
        if inside:
            pieces[-1].append(point)
        last = point
    return pieces


def _crossing(a: Point, b: Point, *, top: float, log: bool) -> Point:
    share = (top - a[1]) / (b[1] - a[1])
    if log:
        return math.exp(math.log(a[0]) + share * (math.log(b[0]) - math.log(a[0]))), top
    return a[0] + share * (b[0] - a[0]), top
