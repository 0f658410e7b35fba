"""The table that `muonwire spectra show` prints."""

from collections.abc import Sequence

import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from muonwire.pages.units import number_text
from muonwire.spectra.measure import Measured
from muonwire.spectra.show_page import summary_rows

# The heads of the summary, short enough for a terminal of 80 columns.
SUMMARY = {
    "condition": "Condition",
    "stable_rank": "Stable",
    "effective_rank": "Effective",
    "entropy": "Entropy",
    "tail": "Tail",
}


def print_summary(measured: Sequence[Measured]) -> None:
    """Medians over the layers, by kind and model."""
    title = "Medians over the layers; stable and effective rank as shares of r"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1, 0, 0))
    labels = [m.label for m in measured]
    several = len(labels) > 1
    names = ("Kind", "Model") if several else ("Kind", "Number")
    for label in names:
        # Where it is tight, a model's name folds; a figure never does.
        table.add_column(label, overflow="fold", no_wrap=label != "Model", min_width=12)
    for label in SUMMARY.values():
        table.add_column(label, justify="right", no_wrap=True)
    for kind, label, count, medians in summary_rows(pl.concat([m.matrices for m in measured]), labels):
        named = (kind, label if several else str(count))
        table.add_row(*named, *(number_text(medians[name]) for name in SUMMARY))
    Console().print(table)
