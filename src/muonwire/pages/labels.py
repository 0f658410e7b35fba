"""Names beside the points of a chart, placed so that they cover neither each other nor a point."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Of a 12-pixel sans serif, rounded up, since fonts differ.
_LETTER_WIDTH = 6.7
_LINE_HEIGHT = 15.0
_POINT_RADIUS = 7.0
# Offsets of the name from its point, by preference, with the alignment that goes with each.
_PLACES = (
    (6.0, -12.0, "left"),
    (0.0, -15.0, "center"),
    (-6.0, -12.0, "right"),
    (10.0, 0.0, "left"),
    (-10.0, 0.0, "right"),
    (-6.0, 12.0, "right"),
    (0.0, 15.0, "center"),
    (6.0, 12.0, "left"),
    (0.0, -28.0, "center"),
    (0.0, 28.0, "center"),
    (14.0, -24.0, "left"),
    (14.0, 24.0, "left"),
    (-14.0, -24.0, "right"),
    (-14.0, 24.0, "right"),
)

_Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Label:
    """Where the name of a point goes, in pixels from the point, with y pointing down."""

    dx: float
    dy: float
    align: str


def place_labels(
    points: Sequence[tuple[float, float, str | None]],
    *,
    width: float,
    height: float,
    line: Sequence[tuple[float, float]] = (),
) -> list[Label | None]:
    """A place for the name of each point, in the order given; the first have the first choice.

    Args:
        points: (x, y, name) in pixels from the upper left corner; one whose name is ``None`` is kept clear and gets no label.
        width: of the plot, in pixels.
        height: of the plot, in pixels.
        line: corners of a line of horizontal and vertical pieces, which names cross only where there is no other place.

    Returns:
        By point, its label, or ``None`` where it has no name or no free place is left.
    """
    taken: list[_Box] = [
        (x - _POINT_RADIUS, y - _POINT_RADIUS, x + _POINT_RADIUS, y + _POINT_RADIUS) for x, y, _ in points
    ]
    pieces = [(min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in pairwise(line)]
    labels: list[Label | None] = []
    for number, (x, y, name) in enumerate(points):
        if name is None:
            labels.append(None)
            continue
        free = []
        for dx, dy, align in _PLACES:
            box = _box(x + dx, y + dy, align=align, text_width=len(name) * _LETTER_WIDTH)
            inside = box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height
            others = (other for place, other in enumerate(taken) if place != number)
            if inside and not any(_overlap(box, other) for other in others):
                free.append((any(_overlap(box, piece) for piece in pieces), box, dx, dy, align))
        if not free:
            labels.append(None)
            continue
        _, box, dx, dy, align = min(free, key=lambda place: place[0])
        labels.append(Label(dx=dx, dy=dy, align=align))
        taken.append(box)
    return labels


def _box(x: float, y: float, *, align: str, text_width: float) -> _Box:
    left = {"left": x, "center": x - text_width / 2, "right": x - text_width}[align]
    return left, y - _LINE_HEIGHT / 2, left + text_width, y + _LINE_HEIGHT / 2


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
