"""Charts and pages: the report of a comparison, and the parts that other reports are made of."""

from muonwire.report.blocks import (
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
)
from muonwire.report.compare_page import compare_page, write_compare_report
from muonwire.report.image import write_png
from muonwire.report.page import render_page
from muonwire.report.results import CURVE_COLUMNS, read_results
from muonwire.report.setting import ReportSetting

__all__ = [
    "CURVE_COLUMNS",
    "Block",
    "Cell",
    "Chart",
    "Column",
    "KeyEntry",
    "Listing",
    "Listings",
    "Page",
    "Points",
    "ReportSetting",
    "Row",
    "Section",
    "Swatch",
    "Table",
    "Terms",
    "Tile",
    "Tiles",
    "compare_page",
    "read_results",
    "render_page",
    "write_compare_report",
    "write_png",
]
