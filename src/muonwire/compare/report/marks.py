"""What the charts of a comparison share: the look of each recipe, and how one is highlighted."""

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from muonwire.compare.report.results import RecipeResult, Results
from muonwire.pages.blocks import KeyEntry, Swatch
from muonwire.pages.scales import log_ticks
from muonwire.pages.spec import legend
from muonwire.pages.theme import series_colour, series_dash, series_shape

# How the figures of an axis are written.
SI_BYTES = "format(datum.value, '.3~s') + 'B'"
PLAIN = "format(datum.value, '.6~g')"


def opacity(visible: float) -> alt.ExprRef:
    """``visible``, and faint while another recipe is highlighted."""
    return alt.ExprRef(f"highlight === '' || datum.recipe === highlight ? {visible} : {visible * 0.12:.3g}")


def swatch(recipe: RecipeResult) -> Swatch:
    """The line sample of ``recipe``."""
    return Swatch(series=series_colour(recipe.index), dash=series_dash(recipe.index))


def recipe_key(recipes: Iterable[RecipeResult]) -> tuple[KeyEntry, ...]:
    """The key of a chart with a line or a point for each of ``recipes``."""
    return tuple(KeyEntry(label=recipe.recipe, swatch=swatch(recipe)) for recipe in recipes)


def recipe_colour(results: Results, *, line: bool = True) -> alt.Color:
    """Colour by recipe, keyed by a ``line`` or a point; the palette is the configuration's."""
    return alt.Color("recipe:N", scale=_scale(results), legend=legend(line=line))


def recipe_dash(results: Results) -> alt.StrokeDash:
    """Dash by recipe."""
    scale = _scale(results, range=[list(series_dash(r.index)) for r in results.recipes])
    return alt.StrokeDash("recipe:N", scale=scale, legend=alt.Legend(title=None))


def recipe_shape(results: Results) -> alt.Shape:
    """Point shape by recipe."""
    scale = _scale(results, range=[series_shape(r.index) for r in results.recipes])
    return alt.Shape("recipe:N", scale=scale, legend=alt.Legend(title=None))


def _scale(results: Results, **options: Any) -> alt.Scale:
    return alt.Scale(domain=[r.recipe for r in results.recipes], **options)


def log_x(
    field: str,
    title: str,
    span: tuple[float, float],
    *,
    label: str = PLAIN,
    ticks: Sequence[float] | None = None,
) -> alt.X:
    """A logarithmic axis over ``span``, its ticks those of ``log_ticks`` where none are given."""
    scale = alt.Scale(type="log", domain=list(span), nice=False)
    axis = alt.Axis(values=ticks or log_ticks(*span), labelOverlap="greedy", labelExpr=label)
    return alt.X(field, title=title, scale=scale, axis=axis)


def tooltips(*names: str) -> list[alt.Tooltip]:
    """What the pointer shows: these fields, all of them texts."""
    return [alt.Tooltip(f"{name}:N", title=name) for name in names]
