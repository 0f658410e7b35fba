"""Where the time of a step goes, by recipe: on this machine, and at the modelled link."""

from collections.abc import Callable
from typing import Any

import altair as alt

from muonwire.compare.report.base import PageChart
from muonwire.compare.report.marks import opacity, tooltips
from muonwire.compare.report.results import RecipeResult, Results, SeedResult
from muonwire.compare.report.setting import ReportSetting
from muonwire.pages.blocks import Chart, KeyEntry, Swatch
from muonwire.pages.spec import inline, spec_of
from muonwire.pages.theme import PART_COLOURS
from muonwire.pages.units import duration_unit, seconds_text

_Parts = dict[str, Callable[[SeedResult], float]]

_COMPUTE: _Parts = {"compute": lambda s: s.compute_s_per_step, "optimizer": lambda s: s.optimizer_s_per_step}
_MEASURED: _Parts = {**_COMPUTE, "exchange": lambda s: s.exchange_s_per_step}
_LINK: _Parts = {**_COMPUTE, "link (modelled)": lambda s: s.link_s_per_step}

_ROW_HEIGHT = 42


def time_at_link(results: Results, setting: ReportSetting) -> Chart | None:
    """Seconds per step at the link: measured computation and the modelled link; ``None`` if all are zero."""
    link = setting.link
    return _bars(
        results,
        parts=_LINK,
        name="step_time_link",
        title=f"Time of a step at {link} (modelled)",
        how_to_read=f"Shorter is better. The link's part is modelled: the measured bytes and messages of a step over {link}, "
        "in place of the exchange as measured here.",
    )


def time_measured(results: Results, _: ReportSetting) -> Chart | None:
    """Seconds per step on this machine, all measured; ``None`` if all are zero."""
    return _bars(
        results,
        parts=_MEASURED,
        name="step_time_measured",
        title="Time of a step on this machine (measured)",
        how_to_read="The exchange is measured over this machine's loopback: packing and unpacking payloads, "
        "moving them, and waiting for the slowest replica.",
    )


def _bars(results: Results, *, parts: _Parts, name: str, title: str, how_to_read: str) -> Chart | None:
    totals = {r.recipe: sum(r.mean(part) for part in parts.values()) for r in results.recipes}
    longest = max(totals.values())
    if longest <= 0:
        return None
    per, unit = duration_unit(longest)
    order = sorted(results.recipes, key=lambda r: (totals[r.recipe], r.index))
    rows = [row for r in order for row in _rows(r, parts=parts, per=per)]
    names = [{"recipe": r.recipe, "text": f"{r.recipe} · {seconds_text(totals[r.recipe])}"} for r in order]
    y = alt.Y("recipe:N", sort=[r.recipe for r in order], axis=None, scale=alt.Scale(padding=0))
    bars = (
        alt.Chart(inline(rows))
        .mark_bar(height=14, yOffset=9, opacity=opacity(1))
        .encode(
            x=alt.X(
                "start:Q",
                title=f"time per step ({unit})",
                scale=alt.Scale(domain=[0, longest / per], nice=False),
            ),
            x2="end:Q",
            y=y,
            color=alt.Color(
                "part:N",
                scale=alt.Scale(domain=list(parts), range=[PART_COLOURS[part] for part in parts]),
                legend=alt.Legend(title=None, symbolType="square", orient="top"),
            ),
            tooltip=tooltips("recipe", "part", "time"),
        )
    )
    # A name above its bar takes no width from the plot, however long it is.
    text = (
        alt.Chart(inline(names))
        .mark_text(align="left", baseline="middle", dy=-8, limit=alt.ExprRef("width"), opacity=opacity(1))
        .encode(x=alt.value(0), y=y, text="text:N")
    )
    return Chart(
        name=name,
        title=title,
        how_to_read=how_to_read,
        spec=spec_of([bars, text], height=_ROW_HEIGHT * len(order)),
        key=tuple(
            KeyEntry(label=part, swatch=Swatch(colour=PART_COLOURS[part]), selects=False) for part in parts
        ),
    )


def _rows(recipe: RecipeResult, *, parts: _Parts, per: float) -> list[dict[str, Any]]:
    rows, start = [], 0.0
    for part, value in parts.items():
        seconds = recipe.mean(value)
        end = start + seconds / per
        row = {"recipe": recipe.recipe, "part": part, "start": start, "end": end}
        rows.append({**row, "time": seconds_text(seconds)})
        start = end
    return rows


TIME_AT_LINK = PageChart(section="time", row="step", draw=time_at_link)
TIME_MEASURED = PageChart(section="time", row="step", draw=time_measured)
