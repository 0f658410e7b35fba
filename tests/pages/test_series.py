"""Charts of one column against another."""

import math

import pytest

from muonwire.errors import UsageError
from muonwire.lab.engine.figures import plot_chart
from muonwire.lab.engine.show import Plot
from muonwire.pages import write_png
from muonwire.pages.series import series_chart
from muonwire.pages.theme import LIGHT_SERIES, SOLID


def _chart(names, *, mark="line", log=False, x=(1.0, 10.0)):
    points = [{"x": at, "y": 1.0 + i, "series": name} for i, name in enumerate(names) for at in x]
    return series_chart(
        points,
        name="c",
        title="t",
        how_to_read="h",
        x_title="x",
        y_title="y",
        mark=mark,
        log_x=log,
        log_y=log,
    )


def _encodings(chart, channel):
    return [layer["encoding"][channel] for layer in chart.spec["layer"] if channel in layer["encoding"]]


def test_more_series_than_colours_are_dashed():
    names = [f"s{i}" for i in range(len(LIGHT_SERIES) + 2)]
    chart = _chart(names)
    (dash,) = _encodings(chart, "strokeDash")
    assert dash["scale"]["range"][0] == list(SOLID)
    assert dash["scale"]["range"][-1] != list(SOLID)
    looks = [(entry.swatch.series, entry.swatch.dash) for entry in chart.key]
    assert len(set(looks)) == len(names)
    assert not _encodings(_chart(names[:3]), "strokeDash")


def test_a_legend_is_not_as_faint_as_a_band_and_a_single_series_has_none():
    assert all(c["legend"]["symbolOpacity"] == 1 for c in _encodings(_chart(["a", "b"]), "color"))
    assert all(c["legend"] is None for c in _encodings(_chart(["a"]), "color"))


def test_every_bar_has_its_name(tmp_path):
    names = tuple(f"the quite long name of method {i}" for i in range(7))
    chart = _chart(["a"], mark="bar", x=names)
    (axis,) = (e["axis"] for e in _encodings(chart, "x"))
    assert '["the quite", "long name", "of method", "6"]' in axis["labelExpr"]
    assert write_png(chart, tmp_path).stat().st_size > 0


def test_a_name_in_code_breaks_behind_its_underscores():
    chart = _chart(["a"], mark="bar", x=("polar_express", "cans", *"abcde"))
    (axis,) = (e["axis"] for e in _encodings(chart, "x"))
    assert '"polar_express": ["polar_", "express"]' in axis["labelExpr"]


def test_a_logarithmic_axis_ends_where_its_points_do():
    for channel in ("x", "y"):
        assert all(e["scale"]["nice"] is False for e in _encodings(_chart(["a"], log=True), channel))


def test_a_logarithmic_axis_has_no_point_at_zero():
    values = _chart(["a"], log=True, x=(0.0, 0.5, 1.0)).spec["data"]["values"]
    assert [v["x"] for v in values] == [0.5, 1.0]


def test_an_unknown_mark_is_refused():
    with pytest.raises(UsageError, match="mark is 'pie'; allowed are line, point, bar"):
        _chart(["a"], mark="pie")


def test_a_plot_leaves_out_the_series_that_it_says():
    rows = [
        {"seed": 0, "n": n, "error": 1.0 / n, "method": m} for n in (1, 2) for m in ("svd", "qr", math.inf)
    ]
    plot = Plot(
        name="p",
        title="t",
        how_to_read="h",
        x=("n", "n"),
        y=("error", "error"),
        series=("method", "Method"),
        left_out=("svd",),
    )
    assert [entry.label for entry in plot_chart(plot, rows, claim="a.1").key] == ["qr", "∞"]
