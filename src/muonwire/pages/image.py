"""A chart as a PNG that stands on its own: with its title and its key."""

from pathlib import Path
from typing import Any

import vl_convert

from muonwire.pages.blocks import Chart
from muonwire.pages.page import VEGA_LITE_VERSION
from muonwire.pages.theme import IMAGE_FONT, chart_config

# Narrow, and with the legend below in two columns: its text can still be read where the image is shown 460 pixels wide, on a phone.
IMAGE_WIDTH = 520
IMAGE_SCALE = 2.0
LEGEND = {"orient": "bottom", "columns": 2, "offset": 12}


def write_png(chart: Chart, folder: Path) -> Path:
    """Draw ``chart`` to ``folder/<name>.png``, in the light scheme and twice the pixels; returns the path."""
    spec: dict[str, Any] = {
        **chart.spec,
        "title": chart.title,
        "width": IMAGE_WIDTH,
        "padding": 18,
        "autosize": "pad",
    }
    config = chart_config(dark=False, font=IMAGE_FONT)
    config["legend"] = {**config["legend"], **LEGEND}
    path = folder / f"{chart.name}.png"
    path.write_bytes(
        vl_convert.vegalite_to_png(
            spec, vl_version=VEGA_LITE_VERSION, config=config, scale=IMAGE_SCALE, allowed_base_urls=[]
        )
    )
    return path
