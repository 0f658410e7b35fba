"""Colours, dashes and type shared by pages and charts, in a light and a dark scheme."""

from typing import Any

# Eight colours that stay apart from each other and the page under protanopia, deuteranopia and tritanopia
# (Machado et al. 2009, full severity): the smallest OKLab distance is 0.096 in the light scheme, 0.11 in the
# dark one. A ninth recipe starts over with another dash and shape: no larger set of colours would stay apart.
LIGHT_SERIES = ("#4052d5", "#de3f2b", "#0a9269", "#c99401", "#700246", "#0d4a7c", "#913700", "#969fab")
DARK_SERIES = ("#95b8fd", "#cf3119", "#a2fceb", "#a1a222", "#fe76b1", "#0689f5", "#fdbd94", "#717480")

# A solid line is one long dash: as many short ones without gaps it takes seconds to rasterize.
SOLID = (10000, 0)
DASHES: tuple[tuple[int, ...], ...] = (SOLID, (7, 3), (2, 3), (9, 3, 2, 3), (14, 3), (2, 2, 2, 5))
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")

# Parts of a step, readable on both backgrounds.
PART_COLOURS = {
    "compute": "#8b93a1",
    "optimizer": "#2a9d8f",
    "exchange": "#b06fd0",
    "link (modelled)": "#e07b2a",
}

PAGE_FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif'
)
IMAGE_FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


def series_colour(index: int) -> int:
    """Place in the palette of the recipe at ``index``."""
    return index % len(LIGHT_SERIES)


def series_dash(index: int) -> tuple[int, ...]:
    """Dash of the recipe at ``index``: the next one after each round of the colours."""
    return DASHES[index // len(LIGHT_SERIES) % len(DASHES)]


def series_shape(index: int) -> str:
    """Point shape of the recipe at ``index``, which changes with the dash."""
    return SHAPES[index // len(LIGHT_SERIES) % len(SHAPES)]


def chart_config(*, dark: bool, font: str = PAGE_FONT) -> dict[str, Any]:
    """Vega-Lite configuration of all charts.

    Args:
        dark: for a dark background.
        font: font families, as in CSS.
    """
    ink, muted, grid, background = (
        ("#e8eaee", "#a4abb8", "#2c3038", "#15171c") if dark else ("#1b1f27", "#5c6573", "#e6e8ec", "#ffffff")
    )
    return {
        "background": background,
        "font": font,
        "view": {"stroke": None},
        "range": {"category": list(DARK_SERIES if dark else LIGHT_SERIES)},
        "mark": {"color": muted},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": muted},
        "title": {"color": ink, "fontSize": 15, "anchor": "start", "offset": 14, "fontWeight": 600},
        "axis": {
            "domainColor": muted,
            "gridColor": grid,
            "tickColor": muted,
            "labelColor": muted,
            "titleColor": ink,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": 500,
            "titlePadding": 8,
            "labelPadding": 5,
        },
        "axisX": {"grid": False, "tickCount": 6, "labelFlush": False},
        # The title lies above the axis, so that it takes no width from the plot.
        "axisY": {
            "domain": False,
            "ticks": False,
            "tickCount": 6,
            "titleAngle": 0,
            "titleAlign": "left",
            "titleBaseline": "bottom",
            "titleAnchor": "end",
            "titleX": -36,
            "titleY": -10,
        },
        "legend": {
            "labelColor": ink,
            "titleColor": muted,
            "labelFontSize": 12,
            "labelLimit": 260,
            "symbolLimit": 60,
            "rowPadding": 4,
        },
    }
