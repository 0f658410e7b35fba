"""The section on the links of --emulate: loss against time on each, and the time to the target, measured beside modelled."""

from dataclasses import replace
from typing import Any

import polars as pl
from markupsafe import Markup

from muonwire.compare.report.curves import draw_curves, time_axis
from muonwire.compare.report.marks import swatch
from muonwire.compare.report.results import CURVE_COLUMNS, Results
from muonwire.compare.report.setting import ReportSetting
from muonwire.compare.report.target import Reached, Target, reached_by
from muonwire.pages.blocks import Block, Cell, Chart, Column, Points, Section, Table, Text, Tile, text_table
from muonwire.pages.units import loss_text, ratio_text, seconds_text

# One row for each evaluation of each run on each link; seconds and bytes are since the run began.
LINK_COLUMNS: dict[str, Any] = {
    "link": pl.String,
    "recipe": pl.String,
    "lr": pl.Float64,
    "seed": pl.Int64,
    "step": pl.Int64,
    "eval_loss": pl.Float64,
    "bytes_egress": pl.Float64,
    "measured_s": pl.Float64,
    "modelled_s": pl.Float64,
}

DEFINITIONS = (
    (
        "Time on an emulated link",
        "Seconds of training where every replica runs on a host of its own, joined to the others by a switch with the link’s rates "
        "and delay: forward and backward pass, optimizer and exchange of the slowest replica between two evaluations. Start-up, "
        "evaluation, probes and checkpoints do not count.",
    ),
)


def on_link(results: Results, link: str) -> Results:
    """The results with the curves of one link: ``measured_s`` on the link, and ``link_s`` modelled."""
    assert results.links is not None
    frame = results.links.filter(pl.col("link") == link).rename({"modelled_s": "link_s"})
    given = [
        (pl.col(name) if name in frame.columns else pl.lit(None)).cast(kind).alias(name)
        for name, kind in CURVE_COLUMNS.items()
        if name != "best"
    ]
    return replace(
        results, curves=frame.select(*given, pl.lit(value=True).alias("best")).select(*CURVE_COLUMNS)
    )


def links_of(results: Results) -> list[str]:
    """The links, in the order of the command."""
    return [] if results.links is None else results.links["link"].unique(maintain_order=True).to_list()


def is_measured(results: Results, link: str) -> bool:
    """Whether any run was emulated on the link."""
    return on_link(results, link).curves["measured_s"].is_not_null().any()


def links_section(results: Results, *, setting: ReportSetting, target: Target | None) -> Section | None:
    """Charts and tables of all links, or ``None`` where there are none."""
    blocks: list[Block] = []
    for link in links_of(results):
        there = on_link(results, link)
        measured = is_measured(results, link)
        chart = _chart(there, link, measured=measured)
        blocks += [chart] if chart else []
        if target:
            reached = _reached(there, target, measured=measured)
            found = _finding(link, reached, target, measured=measured)
            blocks += [Points(items=(found,))] if found else []
            blocks.append(_table(there, link, reached, target, measured=measured))
    if not blocks:
        return None
    lead: Text = (
        "Each recipe trained again at its best rate until it reached the target, every replica on a host of its own."
        if any(is_measured(results, link) for link in links_of(results))
        else "Modelled: the links could not be emulated on this machine."
    )
    return Section(title="Emulated links", anchor="links", lead=lead, blocks=tuple(blocks))


def _reached(there: Results, target: Target, *, measured: bool) -> dict[str, Reached]:
    """By recipe, what it had spent on the link when it reached the target; without those that were not measured there yet."""
    reached = reached_by(there, target.loss)
    return {recipe: r for recipe, r in reached.items() if r.measured_s > 0 or not measured}


def link_tile(results: Results, target: Target | None) -> Tile | None:
    """The least measured time to the target on the first link; ``None`` where none was measured."""
    links = [link for link in links_of(results) if is_measured(results, link)]
    if not links or target is None:
        return None
    reached = list(_reached(on_link(results, links[0]), target, measured=True).values())
    if not reached:
        return None
    least = min(reached, key=lambda r: r.measured_s)
    recipe = results.find(least.recipe)
    assert recipe is not None
    label = f"Least time to {loss_text(target.loss)} at {links[0]}, measured"
    return Tile(label=label, value=seconds_text(least.measured_s), detail=least.recipe, swatch=swatch(recipe))


def _chart(there: Results, link: str, *, measured: bool) -> Chart | None:
    how = "measured" if measured else "modelled"
    slug = link.replace("/", "_").replace(":", "-").replace(".", "_")
    read = (
        "Training time on the emulated link. A line ends where its recipe reached the target."
        if measured
        else "Modelled: the measured computation plus the time of the measured bytes and messages over the link."
    )
    return draw_curves(
        there,
        axis=time_axis(there, column="measured_s" if measured else "link_s", title=f"time at {link}, {how}"),
        name=f"loss_at_{slug}",
        title=f"Loss by time at {link} ({how})",
        how_to_read=f"Further left is sooner. {read}",
    )


def _time(reached: Reached, *, measured: bool) -> float:
    return reached.measured_s if measured else reached.link_s


def _finding(link: str, reached: dict[str, Reached], target: Target, *, measured: bool) -> Markup | None:
    times = {recipe: _time(r, measured=measured) for recipe, r in reached.items()}
    times = {recipe: seconds for recipe, seconds in times.items() if seconds > 0}
    if len(times) < 2:
        return None
    least = min(times, key=lambda recipe: times[recipe])
    how = "measured" if measured else "modelled"
    sentence = Markup("To a loss of {} at {}, <b>{}</b> needed the least {} time, {}").format(
        loss_text(target.loss), link, least, how, seconds_text(times[least])
    )
    if target.reference in times and least != target.reference:
        other = times[target.reference]
        sentence += Markup(": {} less than <b>{}</b> ({})").format(
            ratio_text(other / times[least]), target.reference, seconds_text(other)
        )
    return sentence + Markup(".")


def _table(
    there: Results, link: str, reached: dict[str, Reached], target: Target, *, measured: bool
) -> Table:
    least = min((_time(r, measured=measured) for r in reached.values()), default=0.0)
    order = sorted(
        there.ordered,
        key=lambda r: (
            r.recipe not in reached,
            _time(reached[r.recipe], measured=measured) if r.recipe in reached else 0,
        ),
    )
    rows = []
    for recipe in order:
        at = reached.get(recipe.recipe)
        name = Cell(text=recipe.recipe, swatch=swatch(recipe))
        if at is None:
            rows.append((name, *[Cell(text="–")] * (5 if measured else 3)))
            continue
        seconds = _time(at, measured=measured)
        times = Cell(text=ratio_text(seconds / least) if least > 0 else "–")
        model = Cell(text=seconds_text(at.link_s), best=not measured and seconds == least)
        steps = Cell(text=f"{at.step}")
        if measured:
            differs = at.link_s / at.measured_s - 1 if at.measured_s > 0 else 0.0
            taken = Cell(text=seconds_text(at.measured_s), best=seconds == least)
            rows.append((name, steps, taken, times, model, Cell(text=f"{100 * differs:+.0f} %")))
        else:
            rows.append((name, steps, model, times))
    to = f"to {loss_text(target.loss)}"
    steps_column, slower = Column(label="Steps", unit=to), Column(label="Of the fastest", unit="times")
    modelled = Column(label="Modelled", unit=to)
    columns: tuple[Column | str, ...] = ("Recipe", steps_column, modelled, slower)
    if measured:
        off = Column(label="Model", unit="against measured")
        columns = ("Recipe", steps_column, Column(label="Measured", unit=to), slower, modelled, off)
    notes = [
        f"{loss_text(target.loss)} is where {target.reference} ended; a dash means that a recipe never "
        + ("reached it, or is still to be trained on this link." if measured else "reached it.")
    ]
    return text_table(f"Time to the target at {link}, fastest first", columns, rows, notes=notes)
