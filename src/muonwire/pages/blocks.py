"""What a page is made of: charts, tables, tiles, listings, definitions and sentences.

Text is escaped when the page is rendered; a ``Markup`` is taken as it is, so build one with
``Markup.format``, which escapes what it is given.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from markupsafe import Markup

from muonwire.errors import UsageError
from muonwire.pages.theme import SOLID

Text = str | Markup

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Swatch:
    """How a series is drawn: place in the palette and dash, or a colour of its own."""

    series: int = 0
    dash: tuple[int, ...] = SOLID
    colour: str | None = None

    @property
    def css(self) -> str:
        """The colour as CSS, which follows the page's scheme for a palette colour."""
        return self.colour or f"var(--series-{self.series + 1})"


@dataclass(frozen=True, kw_only=True)
class KeyEntry:
    """One entry of a chart's key. With ``selects``, pointing at it highlights that series in all charts."""

    label: str
    swatch: Swatch
    selects: bool = True


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A Vega-Lite chart with the words around it.

    Args:
        name: of its image file and its anchor: lower-case letters, digits, ``_`` and ``-``.
        title: above the chart.
        how_to_read: a sentence or two on how to read it.
        spec: Vega-Lite, without configuration; of width ``"container"``.
        key: the series, in the order to list them.
        notes: what the chart leaves out, and why.

    Raises:
        UsageError: the name is no plain file name.
    """

    name: str
    title: str
    how_to_read: Text
    spec: Mapping[str, Any]
    key: tuple[KeyEntry, ...] = ()
    notes: tuple[Text, ...] = ()
    kind: ClassVar[str] = "chart"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"Chart: name {self.name!r} is no plain file name; use lower-case letters, digits, '_' and '-'"
            )


@dataclass(frozen=True, kw_only=True)
class Row:
    """Charts side by side where the page is wide enough, below each other where not."""

    charts: tuple[Chart, ...]
    kind: ClassVar[str] = "row"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Args:
        label: its heading.
        unit: goes below it.
        numeric: aligned to the right.
        words: holds sentences, which wrap to the width that there is.
    """

    label: str
    unit: str = ""
    numeric: bool = True
    words: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table.

    Args:
        text: its value.
        detail: a second, smaller line.
        best: the best value of its column.
        flag: a remark on the value, such as ``"diverged"``.
        swatch: a line sample before the text.
    """

    text: Text
    detail: Text = ""
    best: bool = False
    flag: Text = ""
    swatch: Swatch | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first cell of each row names the row."""

    caption: Text
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[Text, ...] = ()
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UsageError(
                    f"Table: a row has {len(row)} cells; its table has {len(self.columns)} columns"
                )


def text_table(
    caption: Text,
    columns: Sequence[Column | str],
    rows: Iterable[Iterable[Cell | Text]],
    *,
    names: int = 1,
    notes: Sequence[Text] = (),
) -> Table:
    """A table whose columns may be labels, and its cells texts; all labelled columns but the first ``names`` hold numbers."""
    heads = (
        Column(label=column, numeric=place >= names) if isinstance(column, str) else column
        for place, column in enumerate(columns)
    )
    body = (tuple(cell if isinstance(cell, Cell) else Cell(text=cell) for cell in row) for row in rows)
    return Table(caption=caption, columns=tuple(heads), rows=tuple(body), notes=tuple(notes))


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number with a label."""

    label: Text
    value: str
    detail: Text
    swatch: Swatch | None = None


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Tiles side by side."""

    tiles: tuple[Tile, ...]
    kind: ClassVar[str] = "tiles"


@dataclass(frozen=True, kw_only=True)
class Points:
    """A list of sentences."""

    items: tuple[Text, ...]
    kind: ClassVar[str] = "points"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Text in a monospaced face, as it is, with a name and remarks."""

    title: str
    text: str
    detail: Text = ""
    swatch: Swatch | None = None


@dataclass(frozen=True, kw_only=True)
class Listings:
    """Listings, side by side where they fit."""

    listings: tuple[Listing, ...]
    kind: ClassVar[str] = "listings"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms and what they mean; ``code`` sets the meanings named there in a monospaced face."""

    items: tuple[tuple[Text, Text], ...]
    code: frozenset[str] = frozenset()
    kind: ClassVar[str] = "terms"


Block = Chart | Row | Table | Tiles | Points | Listings | Terms


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page with a heading; ``anchor`` is its address in the page, ``listed`` whether the page's head links to it."""

    title: str
    anchor: str
    blocks: tuple[Block, ...]
    lead: Text = ""
    listed: bool = True


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page.

    Args:
        title: its heading.
        lead: the main result, in one sentence.
        sections: its parts.
        kicker: a short line above the title.
        facts: short facts below the lead.
        footer: the last line.
    """

    title: str
    lead: Text
    sections: tuple[Section, ...]
    kicker: Text = ""
    facts: tuple[Text, ...] = ()
    footer: Text = ""

    @property
    def charts(self) -> tuple[Chart, ...]:
        """Every chart, in order."""
        found: list[Chart] = []
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Chart):
                    found.append(block)
                elif isinstance(block, Row):
                    found.extend(block.charts)
        return tuple(found)
