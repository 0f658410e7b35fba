"""Final loss against bits per parameter and step, with the recipes that no other beats on both."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import altair as alt

from muonwire.compare.report.base import PageChart
from muonwire.compare.report.marks import log_x, opacity, recipe_colour, recipe_key, recipe_shape, tooltips
from muonwire.compare.report.names import short_names
from muonwire.compare.report.results import RecipeResult, Results
from muonwire.pages.blocks import Chart
from muonwire.pages.labels import place_labels
from muonwire.pages.scales import log_domain
from muonwire.pages.spec import CHART_HEIGHT, inline, spec_of
from muonwire.pages.units import digits_text, listing_text, loss_text

# Plot widths the names are laid out for, and from which and below which width of the plot each layout is shown.
_LAYOUTS = ((280.0, 0, 520), (520.0, 520, 640), (640.0, 640, 900), (960.0, 900, 100_000))
# Up to as many recipes, all points are named; beyond, those on the frontier and the named ones.
_MOST_NAMED = 8
# Dense recipes that a reader measures the others against.
_LANDMARKS = ("muon", "adamw")


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point matches or beats on both coordinates, by x.

    >>> frontier([(1.0, 3.0), (2.0, 3.5), (4.0, 2.0)])
    [0, 2]
    """
    best, kept = math.inf, []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def loss_by_bits(results: Results, *, named: Sequence[str | None] = ()) -> Chart | None:
    """Final loss against bits per parameter and step, or ``None`` if no ranked recipe sent anything.

    Args:
        results: the comparison.
        named: recipes whose points are named even where there are many; dense Muon, AdamW and the frontier always are.
    """
    shown = [r for r in results.ranking if r.bits > 0]
    if not shown:
        return None
    notes = []
    unsent = [r.recipe for r in results.ranking if r not in shown]
    if unsent:
        notes.append(f"Not shown, as the axis has no zero: {listing_text(unsent)}, with nothing sent.")
    diverged = [r.recipe for r in results.recipes if not r.ranked]
    if diverged:
        notes.append(f"Not shown, as a run diverged: {listing_text(diverged)}.")
    seeds = [loss for r in shown for loss in r.losses]
    low, high = _loss_range(shown, seeds=seeds)
    cut = [r.recipe for r in shown if _loss(r) > high]
    if cut:
        notes.append(f"Above the upper edge at {loss_text(high)}: {listing_text(cut)}.")
    if results.num_seeds > 1:
        notes.append("Small points are single seeds, bars their range, large points their mean.")
    if len(shown) > _MOST_NAMED:
        notes.append(
            "Named are the recipes on the line and the references; the others are in the key and under the pointer."
        )
    spec = _layers(
        results,
        shown=[r for r in shown if _loss(r) <= high],
        low=low,
        high=high,
        named={*named, *_LANDMARKS} if len(shown) > _MOST_NAMED else {r.recipe for r in shown},
    )
    return Chart(
        name="loss_by_bits",
        title="Final loss by bits per parameter and step",
        how_to_read="Lower and further left is better. The line joins the recipes that no other beats on both loss and bits; "
        "recipes above it pay more than they need to.",
        spec=spec_of(spec),
        key=recipe_key(shown),
        notes=tuple(notes),
    )


def _loss(recipe: RecipeResult) -> float:
    assert recipe.loss is not None
    return recipe.loss


def _loss_range(shown: Sequence[RecipeResult], *, seeds: Sequence[float]) -> tuple[float, float]:
    means = sorted(_loss(r) for r in shown)
    low, high = min(seeds), max(seeds)
    # One recipe with a high loss must not flatten the others.
    if len(means) > 3:
        high = min(high, means[0] + 5 * (means[len(means) * 2 // 3] - means[0]) + 1e-9)
    room = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def _layers(
    results: Results, *, shown: list[RecipeResult], low: float, high: float, named: set[str | None]
) -> list[Any]:
    span = log_domain([r.bits for r in shown], margin=0.08)
    x = log_x("bits:Q", "bits sent per parameter and step, logarithmic", span)
    scale = alt.Scale(domain=[low, high], zero=False, nice=False)
    y = alt.Y("loss:Q", title="final evaluation loss", scale=scale)
    colour, shape = recipe_colour(results, line=False), recipe_shape(results)
    tooltip = tooltips("recipe", "bits sent", "final loss", "seeds")
    shorts = short_names(shown)
    rows = [_row(r) for r in shown]
    best = frontier([(row["bits"], row["loss"]) for row in rows])
    # In the order in which they choose a place for their names.
    others = sorted(set(range(len(rows))) - set(best), key=lambda i: (rows[i]["recipe"] not in named, i))
    texts = [
        (rows[i], shorts[rows[i]["recipe"]] if i in best or rows[i]["recipe"] in named else None)
        for i in (*best, *others)
    ]
    layers: list[Any] = [
        alt.Chart(inline(rows[i] for i in best))
        .mark_line(interpolate="step-after", strokeWidth=1.25, strokeDash=[4, 3], opacity=0.7)
        .encode(x=x, y=y)
    ]
    if results.num_seeds > 1:
        seeds = [{"recipe": r.recipe, "bits": r.bits, "loss": loss} for r in shown for loss in r.losses]
        layers += [
            alt.Chart(inline(rows))
            .mark_rule(strokeWidth=1.5, opacity=opacity(0.8), clip=True)
            .encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=colour),
            alt.Chart(inline(seeds))
            .mark_point(filled=True, size=22, opacity=opacity(0.8), clip=True)
            .encode(x=x, y=y, color=colour),
        ]
    layers.append(
        alt.Chart(inline(rows))
        .mark_point(filled=True, size=130, opacity=opacity(1))
        .encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip)
    )
    for width, least, below in _LAYOUTS:
        visible = f"width >= {least} && width < {below}"
        layers += _names(
            texts, num_best=len(best), width=width, span=span, range_=(low, high), x=x, y=y, visible=visible
        )
    return layers


def _row(recipe: RecipeResult) -> dict[str, Any]:
    return {
        "recipe": recipe.recipe,
        "bits": recipe.bits,
        "loss": _loss(recipe),
        "low": min(recipe.losses),
        "high": max(recipe.losses),
        "bits sent": f"{digits_text(recipe.bits)} per parameter and step",
        "final loss": loss_text(_loss(recipe)),
        "seeds": ", ".join(loss_text(loss) for loss in recipe.losses),
    }


def _names(
    texts: list[tuple[dict[str, Any], str | None]],
    *,
    num_best: int,
    width: float,
    span: tuple[float, float],
    range_: tuple[float, float],
    x: Any,
    y: Any,
    visible: str,
) -> list[Any]:
    low, high = range_
    decades = math.log(span[1] / span[0])

    def place(row: dict[str, Any]) -> tuple[float, float]:
        return (
            width * math.log(row["bits"] / span[0]) / decades,
            CHART_HEIGHT * (high - row["loss"]) / (high - low),
        )

    layers = []
    corners = [place(row) for row, _ in texts[:num_best]]
    line = [corner for a, b in pairwise(corners) for corner in (a, (b[0], a[1]), b)]
    labels = place_labels(
        [(*place(row), text) for row, text in texts], width=width, height=CHART_HEIGHT, line=line
    )
    for align in ("left", "center", "right"):
        placed = [
            {name: row[name] for name in ("recipe", "bits", "loss")}
            | {"name": text, "dx": label.dx, "dy": label.dy}
            for (row, text), label in zip(texts, labels, strict=True)
            if label is not None and label.align == align
        ]
        if placed:
            layers.append(
                alt.Chart(inline(placed))
                .mark_text(
                    align=align,
                    baseline="middle",
                    # Hidden names of the other layouts would widen the chart.
                    clip=True,
                    dx=alt.ExprRef("datum.dx"),
                    dy=alt.ExprRef("datum.dy"),
                    opacity=alt.ExprRef(
                        f"({visible}) && (highlight === '' || datum.recipe === highlight) ? 1 : 0"
                    ),
                )
                .encode(x=x, y=y, text="name:N")
            )
    return layers


LOSS_BY_BITS = PageChart(
    section="loss",
    draw=lambda results, setting: loss_by_bits(results, named=(setting.reference, setting.subject)),
)
