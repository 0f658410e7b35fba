"""From the kept runs of a part to its table and its chart."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
from benchmarks.scale.plan import DENSE, PARTS, Part, made_of

from muonwire.pages.blocks import Chart
from muonwire.pages.image import write_png
from muonwire.pages.series import series_chart
from muonwire.recipes import parse_recipe

Rows = list[dict[str, Any]]
# In percent: what ends farther above dense Muon is in the table alone, since beside it nothing else would be seen.
MOST_SHOWN = 50.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """A recipe in a setting, at its best rate.

    Args:
        setting: its row's name, and x where it stands on the axis.
        recipe: as it was run.
        runs: of its seeds, in their order.
        at_edge: whether the best rate is the lowest or highest of those that were tried.
        over: by seed, percent above the reference's run with that seed; empty where there is no reference.
    """

    setting: str
    x: str
    recipe: str
    runs: Rows
    at_edge: bool
    over: dict[int, float]

    @property
    def bits(self) -> float:
        """Bits sent per parameter and step."""
        return fmean(run["bits_sent"] for run in self.runs)

    @property
    def mean_over(self) -> float:
        """Over the seeds, in percent."""
        return fmean(self.over.values())


def read(path: Path) -> Rows:
    """The kept runs of recipes as they are today; none without the file."""
    rows = pl.read_parquet(path).to_dicts() if path.exists() else []
    return [row for row in rows if row["chains"] == made_of(row["recipe"])]


def lines_of(rows: Rows) -> list[Line]:
    """A line for each recipe of each setting that ended with a loss, in the order of the runs."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        best = {recipe: found for recipe in _recipes(own) if (found := _best(own, recipe))}
        dense = [runs for recipe, (runs, _) in best.items() if recipe in DENSE]
        common = set.intersection(*({run["seed"] for run in runs} for runs in dense)) if dense else set()
        reference = min(
            dense, key=lambda runs: fmean(r["loss"] for r in runs if r["seed"] in common), default=[]
        )
        theirs = {run["seed"]: run["loss"] for run in reference}
        for recipe, (runs, at_edge) in best.items():
            over = {r["seed"]: 100 * (r["loss"] / theirs[r["seed"]] - 1) for r in runs if r["seed"] in theirs}
            lines.append(
                Line(setting=setting, x=runs[0]["x"], recipe=recipe, runs=runs, at_edge=at_edge, over=over)
            )
    return lines


def _recipes(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["recipe"] for row in rows))


def _best(rows: Rows, recipe: str) -> tuple[Rows, bool] | None:
    """The runs at the rate that ended lowest with the first seed, and whether that rate is the outermost one."""
    own = sorted((row for row in rows if row["recipe"] == recipe), key=lambda row: row["seed"])
    first = [row for row in own if row["seed"] == own[0]["seed"]]
    ended = [row for row in first if row["loss"] is not None]
    if not ended:
        return None
    lr = min(ended, key=lambda row: (row["loss"], row["lr"]))["lr"]
    tried = [row["lr"] for row in first]
    at_rate = [row for row in own if row["lr"] == lr and row["loss"] is not None]
    return at_rate, lr in (min(tried), max(tried))


def table(part: Part, rows: Rows) -> str:
    """The table of a part in Markdown, or the sentence that says that it was not run."""
    lines = lines_of(rows)
    if not lines:
        return "This part has not been run.\n"
    head = "settings" if part.x != "setting" else part.x_title
    text = f"| {head} | recipe | loss | above dense | bits sent | rate | seeds |\n|---|---|--:|--:|--:|--:|--:|\n"
    order = {str(setting.x): i for i, setting in enumerate(part.settings)}
    for line in sorted(lines, key=lambda line: _place(line.x, order)):
        loss = fmean(run["loss"] for run in line.runs)
        over = f"{line.mean_over:+.2f} %" if line.over else "–"
        if len(line.over) > 1:
            over += f" ({min(line.over.values()):+.2f} to {max(line.over.values()):+.2f})"
        rate = f"{line.runs[0]['lr']:g}{'*' * line.at_edge}"
        text += f"| {line.x} | `{line.recipe}` | {loss:.4f} | {over} | {line.bits:.3g} | {rate} | {len(line.runs)} |\n"
    if any(line.at_edge for line in lines):
        text += "\n\\* The best rate is the lowest or the highest of those that have been tried.\n"
    return text


# Factors of the best rate, of which the grid has those that were tried.
FACTORS = {0.25: "a quarter", 0.5: "half", 2.0: "twice", 4.0: "four times"}


def rates_table(part: Part, rows: Rows) -> str:
    """What it costs to be off in the rate: percent above the loss at the best rate, with the first seed; "" where one was tried."""
    order = {str(setting.x): i for i, setting in enumerate(part.settings)}
    made = []
    for line in sorted(lines_of(rows), key=lambda line: _place(line.x, order)):
        best = line.runs[0]
        tried = {
            row["lr"] / best["lr"]: row["loss"]
            for row in rows
            if (row["setting"], row["recipe"], row["seed"]) == (line.setting, line.recipe, best["seed"])
        }
        if len(tried) == 1:
            continue
        cells = [_cost_of_rate(tried, factor, best["loss"]) for factor in FACTORS]
        made.append(f"| {line.x} | `{line.recipe}` | {best['lr']:g} | {' | '.join(cells)} |\n")
    if not made:
        return ""
    head = "settings" if part.x != "setting" else part.x_title
    return (
        "\nWhat it costs to be off in the rate, with the first seed: percent above the loss at the best.\n\n"
        f"| {head} | recipe | best rate | {' | '.join(FACTORS.values())} |\n|---|---|--:{'|--:' * len(FACTORS)}|\n{''.join(made)}"
    )


def _cost_of_rate(tried: Mapping[float, float | None], factor: float, best: float) -> str:
    found = next((t for t in tried if math.isclose(t, factor, rel_tol=1e-6)), None)
    if found is None:
        return ""
    loss = tried[found]
    return "diverged" if loss is None else f"{100 * (loss / best - 1):+.2f}"


def _place(x: str, order: dict[str, int]) -> tuple[float, float]:
    """Numbers by their size, names in the order of the plan."""
    number = _number(x)
    return (number, 0.0) if number is not None else (0.0, float(order.get(x, len(order))))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def chart(name: str, part: Part, rows: Rows) -> Chart | None:
    """The chart of a part; None where no recipe stands beside a reference."""
    points = [point for line in lines_of(rows) if line.over and (point := _point(part, line)) is not None]
    points = [point for point in points if point["y"] <= MOST_SHOWN]
    if not points:
        return None
    points.sort(key=lambda p: (p["series"], p["x"] if isinstance(p["x"], float) else 0.0))
    named = any(isinstance(p["x"], str) for p in points)
    return series_chart(
        points,
        name=name,
        title=part.title,
        how_to_read="Percent of loss above the better dense Muon with the same seeds; bars span the seeds.",
        x_title=part.x_title,
        y_title="above dense Muon, %",
        mark="bar" if named else "line",
        log_x=part.log_x and not named,
    )


def _point(part: Part, line: Line) -> dict[str, Any] | None:
    name, options = parse_recipe(line.recipe)
    x: float | str | None = _number(line.x) if _number(line.x) is not None else line.x
    series = line.recipe
    if part.x != "setting" and line.recipe in DENSE:
        # It is the axis at 0 %.
        return None
    if part.x == "bits":
        form = (
            ", in turns"
            if "parts" in options
            else ", uncompressed"
            if options.get("codec") == "float32"
            else ""
        )
        x, series = line.bits, f"{name}{form}"
    over = line.over.values()
    return {"x": x, "y": line.mean_over, "series": series, "low": min(over), "high": max(over)}


def draw(evidence: Path, images: Path) -> list[Path]:
    """The charts of the parts that have been run, as PNGs."""
    charts = [chart(name, part, read(evidence / f"{name}.parquet")) for name, part in PARTS.items()]
    images.mkdir(parents=True, exist_ok=True)
    return [write_png(made, images) for made in charts if made is not None]


def section(name: str, evidence: Path) -> str:
    """What the page says of a part: its table, and its chart where there is one."""
    part, rows = PARTS[name], read(evidence / f"{name}.parquet")
    shown = chart(name, part, rows)
    picture = "" if shown is None else f"![{part.title}](images/scale/{name}.png)\n\n"
    if picture and any(line.over and line.mean_over > MOST_SHOWN for line in lines_of(rows)):
        picture += f"What ends more than {MOST_SHOWN:g} % above is in the table only.\n\n"
    return f"{part.about}\n\n{picture}{table(part, rows)}{rates_table(part, rows)}"
