"""Final loss by learning rate, with the rate that was chosen for each recipe."""

from typing import Any

import altair as alt
import polars as pl

from muonwire.compare.report.base import PageChart
from muonwire.compare.report.marks import log_x, opacity, recipe_colour, recipe_dash, recipe_key, tooltips
from muonwire.compare.report.results import Results
from muonwire.compare.report.setting import ReportSetting
from muonwire.pages.blocks import Chart
from muonwire.pages.scales import focus_domain, log_domain
from muonwire.pages.spec import inline, spec_of
from muonwire.pages.units import loss_text, lr_text

# Up to as many rates, the axis names the rates that were tried.
_MOST_TICKS = 10


def loss_by_rate(results: Results, setting: ReportSetting) -> Chart | None:
    """Final loss against learning rate, or ``None`` if no recipe tried more than one rate above zero."""
    rates = _rates(results)
    if rates.is_empty() or rates.group_by("recipe").len()["len"].max() == 1:
        return None
    finished = rates.filter(pl.col("num_diverged") == 0)
    start = results.curves.filter(pl.col("eval_loss").is_not_null()).sort("step")
    if finished.is_empty() or start.is_empty():
        return None
    first = float(start["eval_loss"][0])
    domain = focus_domain([[(0.0, first), (1.0, float(loss))] for loss in finished["loss"]])
    assert domain is not None
    low, top = domain
    worst = float(finished.select(pl.col("loss").max()).item())
    notes = []
    if worst > top:
        notes.append(
            f"Losses above {loss_text(top)} are drawn as triangles at the upper edge; the worst is {loss_text(worst)}."
        )
    if finished.height < rates.height:
        notes.append("A cross at the upper edge is a rate at which a run diverged.")
    drawn = set(rates["recipe"])
    searched = setting.lr_searched
    if searched:
        reading = (
            "Only the best rates of an earlier search with the same setting were tried; it covered "
            f"{', '.join(map(lr_text, searched))}. A ring at the lowest or highest of these means they may be too narrow."
        )
    else:
        reading = (
            "A flat line means that the loss depends little on the rate; a ring at the end of a line means that the grid may be "
            "too narrow."
        )
    return Chart(
        name="loss_by_rate",
        title="Loss by learning rate",
        how_to_read=f"Each recipe is compared at its own best rate, which the larger ring marks. {reading}",
        spec=spec_of(_layers(results, rows=_rows(rates, top=top), low=low, top=top)),
        key=recipe_key(r for r in results.ordered if r.recipe in drawn),
        notes=tuple(notes),
    )


def _rates(results: Results) -> pl.DataFrame:
    """By recipe and rate: mean and extremes of the final loss over the seeds, and how many diverged."""
    return (
        results.curves.filter(pl.col("lr") > 0)
        .group_by("recipe", "lr", "seed", maintain_order=True)
        .agg(pl.col("eval_loss").last(), pl.col("best").last())
        .group_by("recipe", "lr", maintain_order=True)
        .agg(
            pl.col("best").any(),
            loss=pl.col("eval_loss").mean(),
            low=pl.col("eval_loss").min(),
            high=pl.col("eval_loss").max(),
            num_diverged=pl.col("eval_loss").is_null().sum(),
            num_seeds=pl.len(),
        )
    )


def _rows(rates: pl.DataFrame, *, top: float) -> list[dict[str, Any]]:
    rows = []
    for row in rates.iter_rows(named=True):
        diverged = row["num_diverged"] > 0
        over = not diverged and row["loss"] > top
        out = {
            "recipe": row["recipe"],
            "lr": row["lr"],
            "best": row["best"],
            "loss": top if diverged else row["loss"],
            "shown": top if diverged or over else row["loss"],
            "mark": "diverged" if diverged else "over" if over else "finished",
            "final loss": f"{row['num_diverged']} of {row['num_seeds']} seeds diverged"
            if diverged
            else loss_text(row["loss"]),
            "rate": lr_text(row["lr"]) + (" (chosen)" if row["best"] else ""),
        }
        if not diverged and row["high"] > row["low"]:
            out |= {"low": row["low"], "high": min(row["high"], top)}
            out["final loss"] += f" ({loss_text(row['low'])} to {loss_text(row['high'])})"
        rows.append(out)
    return rows


def _layers(results: Results, *, rows: list[dict[str, Any]], low: float, top: float) -> list[Any]:
    rates = sorted({row["lr"] for row in rows})
    span = log_domain(rates)
    ticks = rates if len(rates) <= _MOST_TICKS else None
    label = "format(datum.value, '.3~g')"
    x = log_x("lr:Q", "learning rate, logarithmic", span, label=label, ticks=ticks)
    scale = alt.Scale(domain=[low, top], zero=False, nice=False)
    colour = recipe_colour(results)
    base = alt.Chart(inline(rows))
    tooltip = tooltips("recipe", "rate", "final loss")

    def points(mark: str, **options: Any) -> Any:
        return (
            base.transform_filter(f"datum.mark === '{mark}'")
            .mark_point(opacity=opacity(1), **options)
            .encode(
                x=x,
                y=alt.Y("shown:Q", title="final evaluation loss", scale=scale),
                color=colour,
                tooltip=tooltip,
            )
        )

    return [
        base.transform_filter("isValid(datum.low)")
        .mark_rule(opacity=opacity(0.6), clip=True)
        .encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=colour),
        base.transform_filter("datum.mark !== 'diverged'")
        .mark_line(strokeWidth=1.75, opacity=opacity(0.85), clip=True)
        .encode(x=x, y=alt.Y("loss:Q", title="final evaluation loss", scale=scale), color=colour)
        .encode(strokeDash=recipe_dash(results)),
        points("finished", filled=True, size=45),
        points("over", filled=True, size=70, shape="triangle-up"),
        points("diverged", filled=True, size=90, shape="cross", angle=45),
        base.transform_filter("datum.best && datum.mark === 'finished'")
        .mark_point(filled=False, size=230, strokeWidth=2, opacity=opacity(1))
        .encode(x=x, y=alt.Y("shown:Q", scale=scale), color=colour, tooltip=tooltip),
    ]


LOSS_BY_RATE = PageChart(section="rates", draw=loss_by_rate)
