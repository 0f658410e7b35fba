"""The contract of a chart of a comparison's page."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from muonwire.compare.report.results import Results
from muonwire.compare.report.setting import ReportSetting
from muonwire.pages.blocks import Chart


@dataclass(frozen=True, kw_only=True)
class PageChart:
    """A chart of the page.

    Args:
        section: where it stands, in the order of the table.
        draw: the chart of these results, named so that its image has a file of its own; None where there is nothing to show.
        row: charts of one row stand side by side where their keys are short. Default: a row of its own.
    """

    section: Literal["loss", "time", "rates"]
    draw: Callable[[Results, ReportSetting], Chart | None]
    row: str | None = None
