"""Vega-Lite specs for the page and the images: size, data and legends."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import altair as alt

CHART_HEIGHT = 360
DIGITS = 6

# The page sets this signal to the series that its reader points at.
_HIGHLIGHT = alt.param(name="highlight", value="")


def legend(*, line: bool) -> alt.Legend:
    """A legend of line samples, or of points, at full opacity."""
    symbol = (
        {"symbolType": "stroke", "symbolStrokeWidth": 3, "symbolSize": 260} if line else {"symbolSize": 90}
    )
    return alt.Legend(title=None, symbolOpacity=1, **symbol)


def inline(rows: Iterable[Mapping[str, Any]]) -> alt.Data:
    """``rows`` as data inside the spec, to ``DIGITS`` significant digits; more are never visible."""
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
