"""A page as one HTML file that needs nothing else: styles, scripts and chart specs are inside it."""

import functools
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair
import jinja2
import vl_convert
from markupsafe import Markup, escape

from muonwire.errors import UsageError
from muonwire.pages.blocks import Page
from muonwire.pages.theme import DARK_SERIES, LIGHT_SERIES, chart_config

# "v6.4.1" is known to vl_convert as "6.4".
VEGA_LITE_VERSION = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def render_page(page: Page) -> str:
    """The HTML of ``page``; the same text for the same page.

    Raises:
        UsageError: if two charts share a name, and so an image file.
    """
    names = [chart.name for chart in page.charts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"render_page: several charts are named {twice}; give each its own name")
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            has_charts=bool(names),
            vega=_vega_bundle(),
            configs={"light": chart_config(dark=False), "dark": chart_config(dark=True)},
            light_series=LIGHT_SERIES,
            dark_series=DARK_SERIES,
        )
    )


def without_legends(spec: Any) -> Any:
    """``spec`` without legends: a page's key is HTML, which wraps on a narrow screen."""
    if isinstance(spec, Mapping):
        return {
            name: None if name == "legend" else value if name == "data" else without_legends(value)
            for name, value in spec.items()
        }
    if isinstance(spec, list):
        return [without_legends(part) for part in spec]
    return spec


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["without_legends"] = without_legends
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str | Markup) -> Markup:
    """``text`` with a place to break before its options, so that a narrow column keeps words whole."""
    return text if isinstance(text, Markup) else Markup(escape(text).replace("(", Markup("<wbr>(")))


@functools.cache
def _vega_bundle() -> Markup:
    name = f"vega-{VEGA_LITE_VERSION}-by-vl-convert-{version('vl-convert-python')}.js"
    # Making it takes a second; where it cannot be kept it is made again.
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        return _inside_script((_cache_folder() / name).read_text(encoding="utf-8"))
    # The type stub requires a snippet, the function does not.
    bundle: str = vl_convert.javascript_bundle(vl_version=VEGA_LITE_VERSION)  # type: ignore[call-arg]
    with suppress(OSError, RuntimeError):
        _keep(_cache_folder() / name, bundle)
    return _inside_script(bundle)


def _inside_script(bundle: str) -> Markup:
    # Inside a script element these two would end it or change how it is read.
    return Markup(bundle.replace("</script", r"<\/script").replace("<!--", r"<\!--"))


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "muonwire"


def _keep(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    Path(name).replace(path)
