"""Charts of several series: lines, points or bars."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from muonwire.errors import UsageError
from muonwire.pages.blocks import Chart, KeyEntry, Swatch
from muonwire.pages.spec import inline, legend, spec_of
from muonwire.pages.theme import series_colour, series_dash

MARKS = ("line", "point", "bar")
# Characters that the names below a chart's bars have together in a line, in the width of an image.
NAMES_WIDTH = 75
# So many whole numbers have a tick each.
FEW_TICKS = 6


def series_chart(
    points: Sequence[Mapping[str, Any]],
    *,
    name: str,
    title: str,
    how_to_read: str,
    x_title: str,
    y_title: str,
    mark: str = "line",
    log_x: bool = False,
    log_y: bool = False,
    height: int = 300,
    dots: bool = True,
) -> Chart:
    """A line, point or bar chart.

    Args:
        points: each with x, y, series, and, for a band or an interval around y, low and high.
        name, title, how_to_read: of the chart.
        x_title, y_title: of the axes; x is a number, or a name.
        mark: "line", "point" or "bar".
        log_x, log_y: logarithmic axes; points that are not above zero there are left out.
        height: in pixels.
        dots: a dot at each point of a line.

    Raises:
        UsageError: an unknown mark.
    """
    if mark not in MARKS:
        raise UsageError(f"chart {name}: mark is {mark!r}; allowed are {', '.join(MARKS)}")
    # The page highlights a series by the field "recipe".
    rows = [
        {**{k: v for k, v in p.items() if k != "series"}, "recipe": p["series"]}
        for p in points
        # One point at zero would take all of a logarithmic axis.
        if not (log_x and p["x"] <= 0) and not (log_y and p["y"] <= 0)
    ]
    labels = list(dict.fromkeys(p["recipe"] for p in rows))
    numeric = all(isinstance(p["x"], int | float) for p in rows) and mark != "bar"
    # Counts, such as layers, have no halves.
    whole = numeric and all(isinstance(p["x"], int) for p in rows)
    different = sorted({p["x"] for p in rows}) if whole else []
    few = 0 < len(different) <= FEW_TICKS and not log_x
    x_axis_style = (
        alt.Axis(values=different, format="d") if few else alt.Axis(tickMinStep=1) if whole else alt.Undefined
    )
    samples = legend(line=mark == "line") if len(labels) > 1 else None
    colour = alt.Color("recipe:N", scale=alt.Scale(domain=labels), legend=samples)
    dashes = [list(series_dash(i)) for i in range(len(labels))]
    # Where there are more series than colours, colours repeat with other dashes.
    dash = (
        alt.StrokeDash("recipe:N", scale=alt.Scale(domain=labels, range=dashes), legend=samples)
        if dashes != dashes[:1] * len(dashes)
        else alt.Undefined
    )
    x_axis = (
        alt.X(
            "x:Q",
            title=x_title,
            axis=x_axis_style,
            scale=_log() if log_x else alt.Scale(type="linear", zero=False),
        )
        if numeric
        else alt.X("x:N", title=x_title, sort=None, axis=_names_axis([str(p["x"]) for p in rows]))
    )
    scale = _log() if log_y else alt.Scale(type="linear", zero=mark == "bar")
    y_axis = alt.Y("y:Q", title=y_title, scale=scale)
    base = alt.Chart(inline(rows))
    at = {"x": x_axis, "y": y_axis, "color": colour}
    tooltip = [
        alt.Tooltip("recipe:N", title="series"),
        alt.Tooltip("x:Q" if numeric else "x:N", title=x_title),
        alt.Tooltip("y:Q", title=y_title),
    ]
    banded = bool(rows) and "low" in rows[0]
    layers: list[Any] = []
    if mark == "bar":
        offset = alt.XOffset("recipe:N", sort=None) if len(labels) > 1 else alt.Undefined
        layers.append(base.mark_bar().encode(**at, xOffset=offset, tooltip=tooltip))
        if banded:
            layers.append(base.mark_rule().encode(x=x_axis, y=alt.Y("low:Q"), y2="high:Q", xOffset=offset))
    else:
        if numeric and banded:
            band = {**at, "y": alt.Y("low:Q", scale=scale, title=y_title)}
            layers.append(base.mark_area(opacity=0.15).encode(**band, y2="high:Q"))
        if mark == "line":
            layers.append(base.mark_line(strokeWidth=2).encode(**at, strokeDash=dash, detail="recipe:N"))
        if mark == "point" or dots:
            layers.append(base.mark_point(filled=True, size=45, opacity=1).encode(**at, tooltip=tooltip))
    key = tuple(
        KeyEntry(label=label, swatch=Swatch(series=series_colour(i), dash=series_dash(i)), selects=False)
        for i, label in enumerate(labels)
    )
    return Chart(
        name=name,
        title=title,
        how_to_read=how_to_read,
        spec=spec_of(layers, height=height),
        key=key if len(labels) > 1 else (),
    )


def _log() -> alt.Scale:
    # Rounded to powers of ten, the axis can be twice as long as what it shows.
    return alt.Scale(type="log", nice=False, padding=12)


def _names_axis(names: Sequence[str]) -> alt.Axis:
    """An axis of names, each in as many lines as it needs to stand beside the others."""
    different = list(dict.fromkeys(names))
    width = max(NAMES_WIDTH // max(len(different), 1), 8)
    lines = {name: _wrapped(name, width) or [name] for name in different}
    return alt.Axis(labelAngle=0, labelOverlap=True, labelExpr=f"({json.dumps(lines)})[datum.label]")


def _wrapped(name: str, width: int) -> list[str]:
    # A name in code, such as polar_express, may break behind its underscores.
    parts = textwrap.wrap(name.replace("_", "_ "), width, break_long_words=False)
    return [part.replace("_ ", "_") for part in parts]
