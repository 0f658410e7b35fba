"""Tables and charts out of a claim's rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from muonwire.lab.engine.check import Interval, Row, Value, by_seed, matches
from muonwire.lab.engine.show import Excerpts, Pivot, Plot
from muonwire.pages import Cell, Chart, Column, Listing, Listings, Table
from muonwire.pages.series import series_chart
from muonwire.pages.units import number_text


def pivot_table(pivot: Pivot, rows: Sequence[Row]) -> Table:
    """A pivot as a table: the mean, its interval below it, and the note's figure where it gives one."""
    names = _distinct(rows, list(pivot.rows), pivot.select)
    quoted = {column for values in pivot.quoted.values() for column in values}
    columns = [Column(label=label, numeric=False) for label in pivot.rows.values()]
    for column, label in pivot.values.items():
        columns.append(Column(label=label))
        if column in quoted:
            columns.append(Column(label=label, unit="the note"))
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


def excerpt_listings(excerpts: Excerpts, rows: Sequence[Row]) -> list[Listings]:
    """The texts of the first seed, those of equal group side by side."""
    first = min((row["seed"] for row in rows if excerpts.text in row), default=None, key=str)
    groups: dict[Value, list[Listing]] = {}
    for row in rows:
        if excerpts.text in row and row["seed"] == first:
            listing = Listing(
                title=_text(row[excerpts.title]),
                text=_text(row[excerpts.text]),
                detail=_text(row[excerpts.detail]),
            )
            groups.setdefault(row[excerpts.group], []).append(listing)
    return [Listings(listings=tuple(listings)) for listings in groups.values()]


def mean_cell(values: Sequence[float]) -> Cell:
    """A mean, with its interval as a second line."""
    if not values:
        return Cell(text="—")
    interval = Interval.of(values)
    spread = "" if interval.repeats == 1 else f"{number_text(interval.low)} to {number_text(interval.high)}"
    return Cell(text=number_text(interval.mean), detail=spread if interval.low != interval.high else "")


def plot_chart(plot: Plot, rows: Sequence[Row], *, claim: str) -> Chart:
    """A plot as a chart, with a band of the confidence interval where there are several seeds.

    Raises:
        UsageError: an unknown mark.
    """
    (x, x_title), (y, y_title) = plot.x, plot.y
    by = [x] if plot.series is None else [x, plot.series[0]]
    points: list[dict[str, Any]] = []
    for name in _distinct(rows, by, plot.select):
        if name[-1] in plot.left_out:
            continue
        values = by_seed(rows, column=y, select={**plot.select, **dict(zip(by, name, strict=True))})
        if not values or (plot.log_y and min(values) <= 0):
            continue
        interval = Interval.of(values)
        series = y_title if plot.series is None else _text(name[1])
        # On a logarithmic axis an interval that reaches zero ends at its smallest value.
        low = max(interval.low, min(values)) if plot.log_y else interval.low
        points.append({"x": name[0], "y": interval.mean, "low": low, "high": interval.high, "series": series})
    return series_chart(
        points,
        name=f"{claim.replace('.', '-').lower()}-{plot.name}",
        title=plot.title,
        how_to_read=plot.how_to_read,
        x_title=x_title,
        y_title=y_title,
        mark=plot.mark,
        log_x=plot.log_x,
        log_y=plot.log_y,
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
