"""A chart as a PNG or an SVG that stands on its own: with its title and its key."""

from pathlib import Path
from typing import Any

import vl_convert

from muonwire.pages.blocks import Chart
from muonwire.pages.page import VEGA_LITE_VERSION
from muonwire.pages.theme import IMAGE_FONT, chart_config

# Narrow, and with the legend below in two columns: text can still be read where an image is shown 460 pixels wide, on a phone.
IMAGE_WIDTH = 520
IMAGE_SCALE = 2.0
LEGEND = {"orient": "bottom", "columns": 2, "offset": 12}


def write_png(chart: Chart, folder: Path) -> Path:
    """Draw ``chart`` to ``folder/<name>.png``, in the light scheme and twice the pixels; returns the path."""
    path = folder / f"{chart.name}.png"
    path.write_bytes(vl_convert.vegalite_to_png(_spec(chart), scale=IMAGE_SCALE, **_options()))
    return path


def write_svg(chart: Chart, folder: Path) -> Path:
    """Draw ``chart`` to ``folder/<name>.svg``, in the light scheme; returns the path."""
    path = folder / f"{chart.name}.svg"
    path.write_text(vl_convert.vegalite_to_svg(_spec(chart), **_options()) + "\n")
    return path


def _spec(chart: Chart) -> dict[str, Any]:
    alone = {"title": chart.title, "width": IMAGE_WIDTH, "padding": 18, "autosize": "pad"}
    return {**chart.spec, **alone}


def _options() -> dict[str, Any]:
    config = chart_config(dark=False, font=IMAGE_FONT)
    config["legend"] = {**config["legend"], **LEGEND}
    return {"vl_version": VEGA_LITE_VERSION, "config": config, "allowed_base_urls": []}
