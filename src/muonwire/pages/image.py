"""A chart as a PNG or an SVG that stands on its own: with its title and its key."""

from pathlib import Path
from typing import Any

import vl_convert

from muonwire.pages.blocks import Chart
from muonwire.pages.page import VEGA_LITE_VERSION
from muonwire.pages.theme import IMAGE_FONT, chart_config

IMAGE_WIDTH = 760
# Text of an SVG is as large as its page shows it: in a narrower picture it can still be read on a phone.
SVG_WIDTH = 480
IMAGE_SCALE = 2.0


def write_png(chart: Chart, folder: Path) -> Path:
    """Draw ``chart`` to ``folder/<name>.png``, in the light scheme and twice the pixels; returns the path."""
    path = folder / f"{chart.name}.png"
    path.write_bytes(
        vl_convert.vegalite_to_png(_spec(chart, width=IMAGE_WIDTH), scale=IMAGE_SCALE, **_options())
    )
    return path


def write_svg(chart: Chart, folder: Path) -> Path:
    """Draw ``chart`` to ``folder/<name>.svg``, in the light scheme; returns the path."""
    path = folder / f"{chart.name}.svg"
    path.write_text(vl_convert.vegalite_to_svg(_spec(chart, width=SVG_WIDTH), **_options()) + "\n")
    return path


def _spec(chart: Chart, *, width: int) -> dict[str, Any]:
    alone = {"title": chart.title, "width": width, "padding": 18, "autosize": "pad"}
    return {**chart.spec, **alone}


def _options() -> dict[str, Any]:
    config = chart_config(dark=False, font=IMAGE_FONT)
    return {"vl_version": VEGA_LITE_VERSION, "config": config, "allowed_base_urls": []}
