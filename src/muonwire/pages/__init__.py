"""The page kit: blocks of a page, charts, images and units, for any subject."""

from muonwire.pages.blocks import (
    Block,
    Cell,
    Chart,
    Column,
    KeyEntry,
    Listing,
    Listings,
    Page,
    Points,
    Row,
    Section,
    Swatch,
    Table,
    Terms,
    Tile,
    Tiles,
    text_table,
)
from muonwire.pages.image import write_png, write_svg
from muonwire.pages.page import render_page
from muonwire.pages.series import series_chart

__all__ = [
    "Block",
    "Cell",
    "Chart",
    "Column",
    "KeyEntry",
    "Listing",
    "Listings",
    "Page",
    "Points",
    "Row",
    "Section",
    "Swatch",
    "Table",
    "Terms",
    "Tile",
    "Tiles",
    "render_page",
    "series_chart",
    "text_table",
    "write_png",
    "write_svg",
]
