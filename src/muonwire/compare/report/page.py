"""The report of a comparison: one page, and its charts as images."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import polars as pl

from muonwire.compare.report import table
from muonwire.compare.report.base import PageChart
from muonwire.compare.report.findings import findings, headline
from muonwire.compare.report.links import DEFINITIONS as LINK_DEFINITIONS
from muonwire.compare.report.links import links_section
from muonwire.compare.report.marks import swatch
from muonwire.compare.report.results import RecipeResult, Results, read_results
from muonwire.compare.report.setting import ReportSetting
from muonwire.compare.report.tables import costs_table, headline_tiles, results_table
from muonwire.compare.report.target import find_target
from muonwire.compare.report.why import DEFINITIONS, why_section
from muonwire.pages.blocks import Block, Listing, Listings, Page, Points, Row, Section, Terms
from muonwire.pages.image import write_png
from muonwire.pages.page import render_page
from muonwire.pages.units import count_text, lr_text

PAGE_NAME = "report.html"
# Each chart by its place in compare/report/table.py, and what a program adds.
CHARTS: dict[str, PageChart] = {
    line: chart for line, chart in vars(table).items() if not line.startswith("_")
}

# Up to as many recipes, two charts share the width of the page.
_MOST_SIDE_BY_SIDE = 8


def write_compare_report(
    folder: Path,
    *,
    setting: ReportSetting,
    summary: Sequence[Mapping[str, Any]],
    curves: pl.DataFrame,
    links: pl.DataFrame | None = None,
) -> list[Path]:
    """Write ``report.html`` and a PNG of each chart into ``folder``; the same bytes for the same input.

    Args:
        folder: where to write; made if missing.
        setting: what was compared.
        summary: one row per recipe and seed at the recipe's chosen rate, as ``read_results`` takes it.
        curves: one row per evaluation point and run of all rates and seeds, as ``read_results`` takes it.
        links: likewise for each link of ``--emulate``. Default: none.

    Returns:
        The paths written, the page first.

    Raises:
        UsageError: for results that lack a field or a column, or name a recipe and seed twice.
    """
    page = compare_page(setting=setting, results=read_results(summary, curves, links))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PAGE_NAME
    path.write_text(render_page(page), encoding="utf-8")
    return [path, *(write_png(chart, folder) for chart in page.charts)]


def compare_page(*, setting: ReportSetting, results: Results) -> Page:
    """The page of a comparison; a chart without anything to show is left out."""
    target = find_target(results, reference=setting.reference)
    tiles = headline_tiles(results, setting=setting, target=target)
    found = findings(results, setting=setting, target=target)
    ranked = results_table(results, setting=setting, target=target)
    explained = why_section(results)
    linked = links_section(results, setting=setting, target=target)
    sections = [
        Section(
            title="Findings",
            anchor="findings",
            blocks=(*([tiles] if tiles else []), *([Points(items=found)] if found else []), ranked),
        ),
        *([linked] if linked else []),
        *_section("Loss", "loss", *_charts("loss", results, setting)),
        *([explained] if explained else []),
        *_section("Time", "time", *_charts("time", results, setting), costs_table(results)),
        *_section("Learning rates", "rates", *_charts("rates", results, setting)),
        Section(
            title="Recipes",
            anchor="recipes",
            lead="What each recipe does to an update, from the gradient to the change of the weight.",
            blocks=(Listings(listings=tuple(_listing(r) for r in results.ordered)),),
        ),
        Section(title="Setting", anchor="setting", blocks=_setting_blocks(setting, results=results)),
        Section(
            title="Definitions",
            anchor="definitions",
            blocks=(_definitions(setting, measures=explained is not None, links=linked is not None),),
        ),
    ]
    replicas = "1 replica" if setting.replicas == 1 else f"{setting.replicas} replicas"
    seeds = "1 seed" if len(setting.seeds) == 1 else f"{len(setting.seeds)} seeds"
    number = len(results.recipes)
    facts = [
        "1 recipe" if number == 1 else f"{number} recipes",
        replicas,
        f"{count_text(setting.steps)} steps",
        seeds,
        f"link {setting.link}",
    ]
    return Page(
        title=setting.title,
        kicker=f"muonwire compare · {setting.date}" if setting.date else "muonwire compare",
        lead=headline(results),
        facts=tuple(facts),
        sections=tuple(sections),
        footer="Every number and sentence on this page is computed from the runs. Each chart is also in this page’s folder as "
        "an image with its key, under the chart’s name.",
    )


def _section(title: str, anchor: str, *blocks: Block | None) -> list[Section]:
    shown = tuple(block for block in blocks if block is not None)
    return [Section(title=title, anchor=anchor, blocks=shown)] if shown else []


def _charts(section: str, results: Results, setting: ReportSetting) -> list[Block]:
    """The charts of a section, those of one row side by side."""
    wanted = [chart for chart in CHARTS.values() if chart.section == section]
    blocks: list[Block] = []
    for row, charts in groupby(wanted, key=lambda chart: chart.row):
        drawn = (chart.draw(results, setting) for chart in charts)
        shown = tuple(chart for chart in drawn if chart is not None)
        # A long key and many lines need the whole width.
        alone = row is None or len(shown) < 2 or any(len(chart.key) > _MOST_SIDE_BY_SIDE for chart in shown)
        blocks += shown if alone else [Row(charts=shown)]
    return blocks


def _listing(recipe: RecipeResult) -> Listing:
    first = recipe.first
    options = ", ".join(f"{name}={value}" for name, value in first.options.items())
    parameters = f"{count_text(first.num_parameters)} parameters"
    return Listing(
        title=recipe.recipe,
        text=first.chain,
        swatch=swatch(recipe),
        detail=f"{parameters}; {options}" if options else parameters,
    )


def _setting_blocks(setting: ReportSetting, *, results: Results) -> tuple[Block, ...]:
    items: list[tuple[str, str]] = [
        ("Command", setting.command),
        ("Task", setting.task),
        ("Model", setting.model),
        ("Replicas", str(setting.replicas)),
        ("Steps", count_text(setting.steps)),
    ]
    if setting.batch_terms is not None:
        batch = f"{count_text(setting.batch_terms)} {setting.terms} per step, over all replicas"
        items.append(("Batch", batch))
    grid = setting.lr_grid
    if isinstance(grid, Mapping):
        items += [(f"Learning rates, {recipe}", _rates(sorted(rates))) for recipe, rates in grid.items()]
    else:
        items.append(("Learning rates", _rates(grid)))
    if setting.lr_searched:
        items.append(("Learning rates searched before", _rates(setting.lr_searched)))
    items += [
        ("Seeds", ", ".join(str(seed) for seed in setting.seeds)),
        ("Link", setting.link),
        ("Machine", setting.machine),
        ("Versions", ", ".join(f"{package} {version}" for package, version in setting.versions.items())),
    ]
    items = [(term, meaning) for term, meaning in items if meaning]
    blocks: tuple[Block, ...] = (Terms(items=tuple(items), code=frozenset({"Command"})),)
    return (*blocks, Points(items=tuple(setting.notes))) if setting.notes else blocks


def _rates(rates: Sequence[float]) -> str:
    return ", ".join(lr_text(rate) for rate in rates)


def _definitions(setting: ReportSetting, *, measures: bool, links: bool) -> Terms:
    return Terms(
        items=(
            (
                "Final loss",
                "Evaluation loss after the last step, at the recipe’s best learning rate of the grid.",
            ),
            (
                "Bytes sent",
                "Payload bytes that a replica hands to the exchange, as they go on the wire, each payload counted once "
                "however many replicas get it. Mean over the replicas.",
            ),
            ("Bytes received", "Payload bytes that a replica gets from all others. Mean over the replicas."),
            (
                "Bytes egress",
                "Bytes sent, times the replicas that each payload goes to: what leaves a replica without multicast or a "
                "server that copies.",
            ),
            ("Bits per parameter and step", "8 × bytes sent per step / number of parameters of the model."),
            ("Compute, optimizer, exchange", "Wall-clock seconds of a step, measured on this machine."),
            (
                "Link time",
                "Modelled, not measured: the seconds that the measured bytes and messages of a step take over a link of "
                f"{setting.link}. Time at the link is the measured computation plus this.",
            ),
            (
                "Diverged",
                "A run whose loss stopped being finite. A recipe is ranked only if all of its seeds finished.",
            ),
            (
                "Seeds",
                "A difference counts as borne out if every seed of one recipe ended below every seed of another.",
            ),
            *(LINK_DEFINITIONS if links else ()),
            *(DEFINITIONS if measures else ()),
        )
    )
