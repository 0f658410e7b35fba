"""Axes, names beside points and numbers as text."""

import pytest

from muonwire.compare.report.frontier import frontier
from muonwire.pages.cut import cut_above
from muonwire.pages.labels import place_labels
from muonwire.pages.scales import focus_domain, log_domain, log_ticks, wants_log
from muonwire.pages.units import bytes_text, digits_text, listing_text, loss_text, ratio_text, seconds_text


def plain(text):
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (12, "12.0 B"),
        (999.4, "999 B"),
        (999.6, "1.00 kB"),
        (1_230_000, "1.23 MB"),
        (5e15, "5.00 PB"),
    ],
)
def test_bytes(num_bytes, text):
    assert plain(bytes_text(num_bytes)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (2e-5, "20.0 µs"),
        (0.32, "320 ms"),
        (0.9999, "1.00 s"),
        (150, "2.50 min"),
        (9000, "2.50 h"),
        (3e5, "3.47 d"),
    ],
)
def test_seconds(seconds, text):
    assert plain(seconds_text(seconds)) == text


def test_numbers():
    assert [loss_text(x) for x in (3.41249, 0.05, 0.00123, 0.0)] == ["3.412", "0.050", "0.0012", "0.000"]
    assert [ratio_text(x) for x in (1.234, 96.2, 167.9)] == ["1.2×", "96×", "168×"]
    assert digits_text(12345.6) == "12,346"
    assert listing_text(["a", "b", "c"]) == "a, b and c"


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e-3), (0.05, 40.0), (1e3, 1e12), (2.1, 2.2)])
def test_log_axis_has_a_few_ticks_inside(low, high):
    span = log_domain([low, high])
    ticks = log_ticks(*span)
    assert span[0] < low
    assert high < span[1]
    assert 2 <= len(ticks) <= 12
    assert all(span[0] <= tick <= span[1] for tick in ticks)


def test_wants_log():
    assert wants_log([1.0, 10.0])
    assert not wants_log([1.0, 2.0])
    assert not wants_log([0.0, 5.0])


def curve(start, end):
    return [(float(step), end + (start - end) * 0.9**step) for step in range(100)]


def test_focus_is_not_squashed_by_one_bad_recipe():
    good = [curve(5.5, end) for end in (3.4, 3.45, 3.6, 3.7)]
    domain = focus_domain([*good, curve(5.5, 90.0)])
    assert domain is not None
    assert domain[0] < 3.4
    assert 3.7 < domain[1] < 5.5


def test_focus_keeps_every_ending_of_ordinary_recipes():
    domain = focus_domain([curve(5.5, end) for end in (3.4, 3.6, 4.0)])
    assert domain is not None
    assert domain[1] > 4.0
    assert focus_domain([]) is None
    flat = focus_domain([[(0.0, 2.0), (1.0, 2.0)]])
    assert flat is not None
    assert flat[0] < 2.0 < flat[1]


def test_frontier():
    assert frontier([(1.0, 3.0), (1.0, 2.5), (2.0, 2.5), (3.0, 2.0)]) == [1, 3]


def test_labels_do_not_cover_each_other():
    points = [(10.0 * i, 5.0 * i % 60 + 40, f"recipe {i}") for i in range(20)]
    labels = place_labels(points, width=300, height=200)
    boxes = []
    for (x, y, name), label in zip(points, labels, strict=True):
        if label is not None:
            width = 6.7 * len(name)
            left = x + label.dx - {"left": 0, "center": width / 2, "right": width}[label.align]
            boxes.append((left, y + label.dy - 7.5, left + width, y + label.dy + 7.5))
    assert len(boxes) >= 5
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert not (
                a[0] < b[2] - 1e-6 and b[0] < a[2] - 1e-6 and a[1] < b[3] - 1e-6 and b[1] < a[3] - 1e-6
            )


def test_cut_leaves_and_comes_back_on_the_edge():
    line = [(1.0, 5.0), (10.0, 3.0), (100.0, 5.0), (1000.0, 5.0), (10000.0, 3.0)]
    pieces = cut_above(line, top=4.0, log=True)
    assert [len(piece) for piece in pieces] == [3, 2]
    assert pieces[0] == [pytest.approx((10**0.5, 4.0)), (10.0, 3.0), pytest.approx((10**1.5, 4.0))]
    assert pieces[1] == [pytest.approx((10**3.5, 4.0)), (10000.0, 3.0)]
    assert cut_above(line, top=2.0, log=True) == []
    assert cut_above(line, top=5.0, log=True) == [line]


def test_labels_cross_a_line_only_where_there_is_no_other_place():
    points, line = [(100.0, 100.0, "name")], [(100.0, 100.0), (200.0, 100.0), (200.0, 150.0)]
    (clear,) = place_labels(points, width=300, height=200, line=line)
    (plain,) = place_labels([(100.0, 100.0, "name")], width=300, height=200)
    assert (clear.dx, clear.dy) == (plain.dx, plain.dy)
    rising = [(100.0, 100.0), (100.0, 60.0), (200.0, 60.0), (200.0, 88.0), (90.0, 88.0)]
    (moved,) = place_labels(points, width=300, height=200, line=rising)
    assert moved.dy >= 0
    (forced,) = place_labels(
        points, width=300, height=200, line=[(0.0, y) for y in range(200)] + [(300.0, y) for y in range(200)]
    )
    assert forced is not None
    assert place_labels([(100.0, 100.0, None)], width=300, height=200) == [None]
