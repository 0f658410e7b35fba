"""Evaluation loss while training, against what it cost: steps, bytes or time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from muonwire.compare.report.base import PageChart
from muonwire.compare.report.marks import (
    PLAIN,
    SI_BYTES,
    log_x,
    opacity,
    recipe_colour,
    recipe_dash,
    recipe_key,
)
from muonwire.compare.report.results import Results
from muonwire.compare.report.setting import ReportSetting
from muonwire.pages.blocks import Chart, Text
from muonwire.pages.cut import cut_above
from muonwire.pages.scales import focus_domain, log_domain, wants_log
from muonwire.pages.spec import inline, spec_of
from muonwire.pages.units import (
    bytes_text,
    digits_text,
    duration_unit,
    listing_text,
    loss_text,
    seconds_text,
)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The cost on the x axis: a column of the curves in ``per`` units, and how to name and print it."""

    column: str
    title: str
    log: bool
    text: Callable[[float], str]
    per: float = 1.0
    label: str = PLAIN


def loss_by_steps(results: Results, _: ReportSetting) -> Chart | None:
    """Loss against optimizer steps, or ``None`` without a finite loss."""
    return draw_curves(
        results,
        axis=_Axis(column="step", title="optimizer steps", log=False, text=digits_text),
        name="loss_by_steps",
        title="Loss by steps",
        how_to_read="Lower is better. Every recipe sees the same data in the same order, so at equal steps this is what a "
        "recipe learns from a batch, whatever it cost to send.",
    )


def loss_by_bytes(results: Results, _: ReportSetting) -> Chart | None:
    """Loss against bytes sent per replica, or ``None`` if no recipe sent any."""
    return draw_curves(
        results,
        axis=_Axis(
            column="bytes_sent",
            title="bytes sent per replica, logarithmic",
            log=True,
            text=bytes_text,
            label=SI_BYTES,
        ),
        name="loss_by_bytes",
        title="Loss by bytes sent",
        how_to_read="Further left is fewer bytes for the same loss. Bytes are counted on the wire, per replica, each payload "
        "once; the axis is logarithmic, so equal distances are equal ratios.",
    )


def loss_by_link_time(results: Results, setting: ReportSetting) -> Chart | None:
    """Loss against the modelled time at the link, or ``None`` without a finite loss."""
    link = setting.link
    return draw_curves(
        results,
        axis=time_axis(results, column="link_s", title=f"time at {link}, modelled"),
        name="loss_by_link_time",
        title=f"Loss by time at {link} (modelled)",
        how_to_read="Further left is sooner. This time is modelled, not measured: the measured computation plus the time the "
        f"measured bytes and messages would take over a link of {link}.",
    )


def loss_by_measured_time(results: Results, _: ReportSetting) -> Chart | None:
    """Loss against wall-clock time of this machine, or ``None`` without a finite loss."""
    return draw_curves(
        results,
        axis=time_axis(results, column="measured_s", title="measured wall-clock time"),
        name="loss_by_measured_time",
        title="Loss by time on this machine (measured)",
        how_to_read="The wall-clock time of the same runs on this machine, where replicas talk over its own fast loopback: "
        "what the recipes cost in computation.",
    )


def time_axis(results: Results, *, column: str, title: str) -> _Axis:
    """The axis of a column of seconds, in the unit that fits, logarithmic where the recipes lie far apart."""
    # The last value of each recipe.
    frame = results.best_curves().group_by("recipe").agg(pl.col(column).max().cast(pl.Float64))
    ends = frame[column].drop_nulls().to_list()
    per, unit = duration_unit(max(ends, default=1.0))
    log = wants_log(ends)
    title = f"{title} ({unit}{', log' if log else ''})"
    return _Axis(column=column, title=title, log=log, text=seconds_text, per=per)


def draw_curves(results: Results, *, axis: _Axis, name: str, title: str, how_to_read: str) -> Chart | None:
    """Loss against the cost of an axis, or ``None`` without a finite loss."""
    runs = _with_cost(results.best_curves().filter(pl.col("eval_loss").is_not_null()), axis=axis)
    ranked = [r.recipe for r in results.ranking]
    means = _with_cost(results.mean_curves().filter(pl.col("recipe").is_in(ranked)), axis=axis)
    shown, notes = runs, []
    if axis.log:
        shown = runs.filter(pl.col("cost") > 0)
        means = means.filter(pl.col("cost") > 0)
        notes += _left_out(results, runs=runs, shown=shown)
    if shown.is_empty():
        return None
    domain = focus_domain(
        [
            [(float(step), loss) for step, loss in run.select("step", "eval_loss").rows()]
            for run in runs.partition_by("recipe", "seed", maintain_order=True)
        ]
    )
    assert domain is not None
    highest = shown["eval_loss"].max()
    assert isinstance(highest, float)
    if highest > domain[1]:
        notes.append(
            f"Cut off above {loss_text(domain[1])}, so that the recipes can be told apart; the highest loss is "
            f"{loss_text(highest)}."
        )
    crosses = _crosses(results, shown=shown, top=domain[1])
    if crosses:
        notes.append("A cross marks where a diverging run stopped having a finite loss.")
    if results.num_seeds > 1:
        notes.append(
            "Thick lines are means over the seeds, thin lines single seeds; a recipe that diverged has no mean."
        )
    drawn = set(shown["recipe"])
    return Chart(
        name=name,
        title=title,
        how_to_read=how_to_read,
        spec=spec_of(_layers(results, axis=axis, shown=shown, means=means, crosses=crosses, domain=domain)),
        key=recipe_key(r for r in results.ordered if r.recipe in drawn),
        notes=tuple(notes),
    )


def _with_cost(frame: pl.DataFrame, *, axis: _Axis) -> pl.DataFrame:
    cost = pl.col(axis.column).cast(pl.Float64)
    return frame.with_columns((cost / axis.per).alias("cost")).filter(cost.is_finite())


def _left_out(results: Results, *, runs: pl.DataFrame, shown: pl.DataFrame) -> list[Text]:
    """Notes on what the logarithmic axis cannot show."""
    notes: list[Text] = []
    uncounted = [r.recipe for r in results.recipes if r.recipe in set(runs["recipe"]) - set(shown["recipe"])]
    if uncounted:
        notes.append(f"Not shown, as the axis has no zero: {listing_text(uncounted)}, with nothing to count.")
    if runs.height > shown.height:
        notes.append(
            "The loss before the first step, at a cost of zero, is left out of the logarithmic axis."
        )
    return notes


def _crosses(results: Results, *, shown: pl.DataFrame, top: float) -> list[dict[str, Any]]:
    """The last finite point of each run that diverged, moved into view."""
    diverged = {(s.recipe, s.seed) for r in results.recipes for s in r.seeds if s.diverged}
    rows = []
    for run in shown.partition_by("recipe", "seed", maintain_order=True):
        last = run.row(run.height - 1, named=True)
        if (last["recipe"], last["seed"]) in diverged:
            rows.append({"recipe": last["recipe"], "cost": last["cost"], "loss": min(last["eval_loss"], top)})
    return rows


def _layers(
    results: Results,
    *,
    axis: _Axis,
    shown: pl.DataFrame,
    means: pl.DataFrame,
    crosses: list[dict[str, Any]],
    domain: tuple[float, float],
) -> list[Any]:
    costs = [float(cost) for cost in shown["cost"]]
    if axis.log:
        x = log_x("cost:Q", axis.title, log_domain(costs), label=axis.label)
    else:
        scale = alt.Scale(domain=[0, max(costs) or 1.0], nice=False)
        x = alt.X("cost:Q", title=axis.title, scale=scale, axis=alt.Axis())
    y = alt.Y("loss:Q", title="evaluation loss", scale=alt.Scale(domain=list(domain), zero=False, nice=False))
    colour, dash = recipe_colour(results), recipe_dash(results)
    top = domain[1]
    layers: list[Any] = []
    if results.num_seeds > 1:
        layers.append(
            alt.Chart(inline(_lines(shown, top=top, log=axis.log)))
            .mark_line(strokeWidth=1, strokeOpacity=opacity(0.4))
            .encode(x=x, y=y, color=colour, strokeDash=dash, detail=["seed:N", "piece:N"])
        )
    else:
        means = shown.with_columns(low=pl.col("eval_loss"), high=pl.col("eval_loss"))
    layers.append(
        alt.Chart(inline(_lines(means.with_columns(seed=0), top=top, log=axis.log)))
        .mark_line(strokeWidth=2.25, strokeOpacity=opacity(1))
        .encode(x=x, y=y, color=colour, strokeDash=dash, detail="piece:N")
    )
    if crosses:
        layers.append(
            alt.Chart(inline(crosses))
            .mark_point(shape="cross", angle=45, size=110, filled=True, opacity=opacity(1))
            .encode(x=x, y=y, color=colour)
        )
    # Not `nearest`: its tooltips read text fields from the wrong object, and say "undefined".
    near = alt.selection_point(name="near", on="pointerover", clear="pointerout", empty=False)
    layers.append(
        alt.Chart(inline(_points(means.filter(pl.col("eval_loss") <= top), axis=axis)))
        .mark_point(filled=True, size=150)
        .encode(
            x=x,
            y=y,
            color=colour,
            opacity=alt.condition(near, alt.value(1), alt.value(0)),
            tooltip=_tooltip(results, axis=axis),
        )
        .add_params(near)
    )
    return layers


def _lines(runs: pl.DataFrame, *, top: float, log: bool) -> list[dict[str, Any]]:
    """One row per point of each line, cut off at ``top``."""
    rows = []
    for run in runs.partition_by("recipe", "seed", maintain_order=True):
        recipe, seed = run.row(0, named=True)["recipe"], run.row(0, named=True)["seed"]
        pieces = cut_above(run.select("cost", "eval_loss").rows(), top=top, log=log)
        rows += [
            {"recipe": recipe, "seed": seed, "piece": number, "cost": cost, "loss": loss}
            for number, piece in enumerate(pieces)
            for cost, loss in piece
        ]
    return rows


def _points(means: pl.DataFrame, *, axis: _Axis) -> list[dict[str, Any]]:
    """One row per evaluation, with the texts of its tooltip."""
    rows = []
    for row in means.iter_rows(named=True):
        out = {
            "recipe": row["recipe"],
            "step": row["step"],
            "cost": row["cost"],
            "loss": row["eval_loss"],
            "eval loss": loss_text(row["eval_loss"]),
        }
        if row["train_loss"] is not None:
            out["train loss"] = loss_text(row["train_loss"])
        if row["high"] > row["low"]:
            out["seeds"] = f"{loss_text(row['low'])} to {loss_text(row['high'])}"
        if axis.column != "step":
            out["at"] = axis.text(row["cost"] * axis.per)
        rows.append(out)
    return rows


def _tooltip(results: Results, *, axis: _Axis) -> list[alt.Tooltip]:
    names = ["recipe", "step", "eval loss", "train loss"]
    if results.num_seeds > 1:
        names.append("seeds")
    fields = [alt.Tooltip(f"{name}:{'Q' if name == 'step' else 'N'}", title=name) for name in names]
    if axis.column != "step":
        title = "sent" if axis.column == "bytes_sent" else "time"
        fields.append(alt.Tooltip("at:N", title=title))
    return fields


LOSS_BY_STEPS = PageChart(section="loss", draw=loss_by_steps)
LOSS_BY_BYTES = PageChart(section="loss", draw=loss_by_bytes)
LOSS_BY_LINK_TIME = PageChart(section="time", row="loss", draw=loss_by_link_time)
LOSS_BY_MEASURED_TIME = PageChart(section="time", row="loss", draw=loss_by_measured_time)
