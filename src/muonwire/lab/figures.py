"""Tables and charts out of a claim's rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from muonwire.errors import UsageError
from muonwire.lab.check import Interval, Row, Value, by_seed, matches
from muonwire.lab.show import Pivot, Plot
from muonwire.report import Cell, Chart, Column, KeyEntry, Swatch, Table
from muonwire.report.charts.parts import inline, spec_of
from muonwire.report.theme import series_colour, series_dash
from muonwire.report.units import digits_text

MARKS = ("line", "point", "bar")


def pivot_table(pivot: Pivot, rows: Sequence[Row]) -> Table:
    """A pivot as a table: the mean, its interval below it, and the source's figure where there is one."""
    names = _distinct(rows, list(pivot.rows), pivot.select)
    quoted = {column for values in pivot.quoted.values() for column in values}
    columns = [Column(label=label, numeric=False) for label in pivot.rows.values()]
    for column, label in pivot.values.items():
        columns.append(Column(label=label))
        if column in quoted:
            columns.append(Column(label=label, unit="the source"))
    body = []
    for name in names:
        select = {**pivot.select, **dict(zip(pivot.rows, name, strict=True))}
        cells = [Cell(text=_text(value)) for value in name]
        for column in pivot.values:
            cells.append(mean_cell(by_seed(rows, column=column, select=select)))
            if column in quoted:
                cells.append(Cell(text=pivot.quoted.get(name, {}).get(column, "—")))
        body.append(tuple(cells))
    return Table(caption=pivot.caption, columns=tuple(columns), rows=tuple(body))


def mean_cell(values: Sequence[float]) -> Cell:
    """A mean, with its interval as a second line."""
    if not values:
        return Cell(text="—")
    interval = Interval.of(values)
    spread = "" if interval.repeats == 1 else f"{number(interval.low)} to {number(interval.high)}"
    return Cell(text=number(interval.mean), detail=spread if interval.low != interval.high else "")


def number(value: float) -> str:
    """Three digits; powers of ten from a million on."""
    return f"{value:.2e}" if abs(value) >= 1e6 else digits_text(value)


def plot_chart(plot: Plot, rows: Sequence[Row], *, claim: str) -> Chart:
    """A plot as a chart, with a band of the confidence interval where there are several seeds.

    Raises:
        UsageError: an unknown mark.
    """
    if plot.mark not in MARKS:
        raise UsageError(f"plot {plot.name}: mark is {plot.mark!r}; allowed are {', '.join(MARKS)}")
    (x, x_title), (y, y_title) = plot.x, plot.y
    by = [x] if plot.series is None else [x, plot.series[0]]
    points: list[dict[str, Any]] = []
    for name in _distinct(rows, by, plot.select):
        values = by_seed(rows, column=y, select={**plot.select, **dict(zip(by, name, strict=True))})
        if not values or (plot.log_y and min(values) <= 0):
            continue
        interval = Interval.of(values)
        series = y_title if plot.series is None else _text(name[1])
        # On a logarithmic axis an interval that reaches zero ends at its smallest value.
        low = max(interval.low, min(values)) if plot.log_y else interval.low
        points.append({"x": name[0], "y": interval.mean, "low": low, "high": interval.high, "recipe": series})
    labels = list(dict.fromkeys(p["recipe"] for p in points))
    numeric = all(isinstance(p["x"], int | float) for p in points) and plot.mark != "bar"
    colour = alt.Color("recipe:N", scale=alt.Scale(domain=labels), legend=alt.Legend(title=None))
    x_axis = (
        alt.X("x:Q", title=x_title, scale=alt.Scale(type="log" if plot.log_x else "linear", zero=False))
        if numeric
        else alt.X("x:N", title=x_title, sort=None, axis=alt.Axis(labelAngle=0, labelOverlap=True))
    )
    scale = alt.Scale(type="log" if plot.log_y else "linear", zero=plot.mark == "bar")
    y_axis = alt.Y("y:Q", title=y_title, scale=scale)
    base = alt.Chart(inline(points))
    tooltip = [
        alt.Tooltip("recipe:N", title="series"),
        alt.Tooltip("x:Q" if numeric else "x:N", title=x_title),
        alt.Tooltip("y:Q", title=y_title),
    ]
    layers: list[Any] = []
    if plot.mark == "bar":
        offset = alt.XOffset("recipe:N", sort=None) if len(labels) > 1 else alt.Undefined
        layers.append(
            base.mark_bar().encode(x=x_axis, y=y_axis, color=colour, xOffset=offset, tooltip=tooltip)
        )
        layers.append(base.mark_rule().encode(x=x_axis, y=alt.Y("low:Q"), y2="high:Q", xOffset=offset))
    else:
        if numeric:
            layers.append(
                base.mark_area(opacity=0.15).encode(
                    x=x_axis, y=alt.Y("low:Q", scale=scale, title=y_title), y2="high:Q", color=colour
                )
            )
        if plot.mark == "line":
            layers.append(
                base.mark_line(strokeWidth=2).encode(x=x_axis, y=y_axis, color=colour, detail="recipe:N")
            )
        layers.append(
            base.mark_point(filled=True, size=45, opacity=1).encode(
                x=x_axis, y=y_axis, color=colour, tooltip=tooltip
            )
        )
    key = tuple(
        KeyEntry(label=label, swatch=Swatch(series=series_colour(i), dash=series_dash(0)), selects=False)
        for i, label in enumerate(labels)
    )
    return Chart(
        name=f"{claim.replace('.', '-').lower()}-{plot.name}",
        title=plot.title,
        how_to_read=plot.how_to_read,
        spec=spec_of(layers, height=300),
        key=key if len(labels) > 1 else (),
    )


def _distinct(
    rows: Sequence[Row], columns: Sequence[str], select: Mapping[str, Value]
) -> list[tuple[Value, ...]]:
    found: dict[tuple[Value, ...], None] = {}
    for row in rows:
        if matches(row, select) and all(c in row for c in columns):
            found[tuple(row[c] for c in columns)] = None
    return list(found)


def _text(value: Value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "—"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "∞"
    return value if isinstance(value, str) else f"{value:g}"
