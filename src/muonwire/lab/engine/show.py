"""What the page shows of a claim's rows, said without code: tables and plots."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muonwire.lab.engine.check import Value


@dataclass(frozen=True, kw_only=True)
class Pivot:
    """A table of means with their confidence intervals over the seeds.

    Args:
        caption: what it shows, in which units.
        rows: columns whose values name a row, with the heading of each.
        values: measured columns, with the heading of each.
        select: the rows that take part. Default: all.
        quoted: the note's figures beside ours: by the values that name a row, then by measured column. Default: none.
    """

    caption: str
    rows: Mapping[str, str]
    values: Mapping[str, str]
    select: Mapping[str, Value] = field(default_factory=dict)
    quoted: Mapping[tuple[Value, ...], Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Excerpts:
    """Texts side by side, of the first seed.

    Args:
        title, detail, text: columns: what stands above a text, below its title, and the text.
        group: column whose equal values are shown side by side.
    """

    title: str
    detail: str
    text: str
    group: str


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A chart of one measured column against another, a series for each value of a third.

    Args:
        name: of its image file: lower-case letters, digits and "-".
        title: what it shows.
        how_to_read: a sentence or two.
        x, y: columns, with their headings.
        series: column that tells the series apart, with its heading. Default: one series.
        mark: "line", "point" or "bar".
        log_x, log_y: logarithmic axes. Default: linear.
        select: the rows that take part. Default: all.
        left_out: series that are not drawn, such as the reference that the others are measured against. Default: none.
    """

    name: str
    title: str
    how_to_read: str
    x: tuple[str, str]
    y: tuple[str, str]
    series: tuple[str, str] | None = None
    mark: str = "line"
    log_x: bool = False
    log_y: bool = False
    select: Mapping[str, Value] = field(default_factory=dict)
    left_out: tuple[Value, ...] = ()
