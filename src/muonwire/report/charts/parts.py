"""What the charts of a comparison share: the look of each recipe, bringing one out, and making the spec."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt

from muonwire.report.blocks import KeyEntry, Swatch
from muonwire.report.results import RecipeResult, Results
from muonwire.report.theme import series_colour, series_dash, series_shape

CHART_HEIGHT = 360
DIGITS = 6

# The page sets this signal to the recipe that its reader points at.
_HIGHLIGHT = alt.param(name="highlight", value="")

SI_BYTES = "format(datum.value, '.3~s') + 'B'"


def opacity(visible: float) -> alt.ExprRef:
    """``visible``, and faint while another recipe is brought out."""
    return alt.ExprRef(f"highlight === '' || datum.recipe === highlight ? {visible} : {visible * 0.12:.3g}")


def swatch(recipe: RecipeResult) -> Swatch:
    """The line sample of ``recipe``."""
    return Swatch(series=series_colour(recipe.index), dash=series_dash(recipe.index))


def recipe_key(recipes: Iterable[RecipeResult]) -> tuple[KeyEntry, ...]:
    """The key of a chart with a line or a point for each of ``recipes``."""
    return tuple(KeyEntry(label=recipe.recipe, swatch=swatch(recipe)) for recipe in recipes)


def legend(*, line: bool) -> alt.Legend:
    """A legend of line samples, or of points; never as faint as a band."""
    symbol = (
        {"symbolType": "stroke", "symbolStrokeWidth": 3, "symbolSize": 260} if line else {"symbolSize": 90}
    )
    return alt.Legend(title=None, symbolOpacity=1, **symbol)


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


def inline(rows: Iterable[Mapping[str, Any]]) -> alt.Data:
    """``rows`` as data inside the spec, to ``DIGITS`` significant digits, as more are never seen."""
    return alt.Data(values=[{name: _rounded(value) for name, value in row.items()} for row in rows])


def spec_of(layers: list[Any], *, height: int = CHART_HEIGHT, **properties: Any) -> dict[str, Any]:
    """``layers`` on top of each other as a Vega-Lite spec as wide as its container."""
    chart = (
        alt.layer(*layers).add_params(_HIGHLIGHT).properties(width="container", height=height, **properties)
    )
    # The tests check the specs of every kind of chart: checking each row of the data here takes seconds.
    spec: dict[str, Any] = chart.to_dict(validate=False, context={"pre_transform": False})
    # The page and the image each bring their own configuration.
    spec.pop("config", None)
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    return spec


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
