"""What the charts of a comparison share: the look of each recipe, and how one is highlighted."""

from collections.abc import Iterable

import altair as alt

from muonwire.compare.report.results import RecipeResult, Results
from muonwire.pages.blocks import KeyEntry, Swatch
from muonwire.pages.spec import legend
from muonwire.pages.theme import series_colour, series_dash, series_shape

SI_BYTES = "format(datum.value, '.3~s') + 'B'"


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
    return alt.Color(
        "recipe:N",
        scale=alt.Scale(domain=[r.recipe for r in results.recipes]),
        legend=legend(line=line),
    )


def recipe_dash(results: Results) -> alt.StrokeDash:
    """Dash by recipe."""
    return alt.StrokeDash(
        "recipe:N",
        scale=alt.Scale(
            domain=[r.recipe for r in results.recipes],
            range=[list(series_dash(r.index)) for r in results.recipes],
        ),
        legend=alt.Legend(title=None),
    )


def recipe_shape(results: Results) -> alt.Shape:
    """Point shape by recipe."""
    return alt.Shape(
        "recipe:N",
        scale=alt.Scale(
            domain=[r.recipe for r in results.recipes],
            range=[series_shape(r.index) for r in results.recipes],
        ),
        legend=alt.Legend(title=None),
    )
