"""The page of one model's spectra, or of several beside each other."""

import statistics
from collections.abc import Sequence
from typing import Any

import polars as pl

from muonwire.pages import Block, Cell, Chart, Column, Page, Row, Section, Table
from muonwire.pages.series import series_chart
from muonwire.pages.units import count_text, file_slug, number_text
from muonwire.spectra.measure import MEASURES, Measured

TITLES = {
    "condition": "Condition number",
    "stable_rank": "Stable rank, share of r",
    "effective_rank": "Effective rank, share of r",
    "entropy": "Spectral entropy",
    "tail": "Tail exponent",
}
# A line of so many points looks like one of all singular values.
MOST_POINTS = 120
MOST_LAYERS = 5


def show_page(measured: Sequence[Measured], *, facts: Sequence[str] = ()) -> Page:
    """Spectra by layer and kind; for several models, each kind's beside each other's.

    Args:
        measured: the models, in order.
        facts: short facts about how the figures were made.
    """
    matrices = pl.concat([m.matrices for m in measured])
    labels = [m.label for m in measured]
    sections = [_summary(matrices, labels)]
    kinds = list(dict.fromkeys(matrices["kind"].to_list()))
    sections.append(_by_layer(matrices, labels))
    values = pl.concat([m.values for m in measured])
    charts = [c for kind in kinds if (c := _spectra(values.filter(pl.col("kind") == kind), kind, labels))]
    sections.append(
        Section(
            title="Singular values by kind",
            anchor="spectra",
            lead="σ over the root of the mean σ², against their place by size: 0 the largest, 1 the smallest.",
            blocks=tuple(_rows(charts)),
        )
    )
    sections.append(_every(matrices, labels))
    several = len(labels) > 1
    return Page(
        title="Singular values: " + ", ".join(labels),
        kicker="muonwire spectra show",
        lead=f"{count_text(len(matrices) // len(labels))} weight matrices"
        + (f" of each of {len(labels)} models, beside each other." if several else ", by layer and kind."),
        facts=tuple(facts),
        sections=tuple(sections),
        footer="; ".join(f"{TITLES[name]}: {formula}" for name, formula in MEASURES.items()) + ".",
    )


def _rows(charts: Sequence[Chart]) -> list[Block]:
    return [Row(charts=tuple(charts[i : i + 2])) for i in range(0, len(charts), 2)]


def summary_rows(
    matrices: pl.DataFrame, labels: Sequence[str]
) -> list[tuple[str, str, int, dict[str, float]]]:
    """By kind and model: how many matrices, and the median of each measure."""
    rows = []
    for kind in dict.fromkeys(matrices["kind"].to_list()):
        for label in labels:
            chosen = matrices.filter((pl.col("kind") == kind) & (pl.col("model") == label))
            if len(chosen):
                medians = {name: statistics.median(chosen[name].to_list()) for name in MEASURES}
                rows.append((kind, label, len(chosen), medians))
    return rows


def _summary(matrices: pl.DataFrame, labels: Sequence[str]) -> Section:
    body = []
    for kind, label, count, medians in summary_rows(matrices, labels):
        cells = [
            Cell(text=kind),
            *([Cell(text=label)] if len(labels) > 1 else []),
            Cell(text=count_text(count)),
        ]
        cells += [Cell(text=number_text(value)) for value in medians.values()]
        body.append(tuple(cells))
    columns = [Column(label="Kind", numeric=False)]
    columns += [Column(label="Model", numeric=False)] if len(labels) > 1 else []
    columns += [Column(label="Matrices"), *(Column(label=TITLES[name]) for name in MEASURES)]
    table = Table(caption="Medians over the layers", columns=tuple(columns), rows=tuple(body))
    return Section(title="By kind", anchor="kinds", blocks=(table,))


def _by_layer(matrices: pl.DataFrame, labels: Sequence[str]) -> Section:
    several = len(labels) > 1
    inside = matrices.filter(pl.col("layer").is_not_null())
    blocks: list[Block] = []
    charts = []
    for name in MEASURES:
        points: list[dict[str, Any]] = []
        by = ["model", "layer"] if several else ["kind", "layer"]
        medians = inside.group_by(by, maintain_order=True).agg(pl.col(name).median())
        for row in medians.sort(by).iter_rows(named=True):
            points.append({"x": row["layer"], "y": row[name], "series": row["model" if several else "kind"]})
        order = labels if several else list(dict.fromkeys(inside["kind"].to_list()))
        points.sort(key=lambda p: (order.index(p["series"]), p["x"]))
        if points:
            charts.append(
                series_chart(
                    points,
                    name=f"layers-{name.replace('_', '-')}",
                    title=TITLES[name],
                    how_to_read=f"{MEASURES[name]}; median over the layer’s matrices"
                    + ("." if several else " of a kind."),
                    x_title="Layer",
                    y_title=TITLES[name],
                    log_y=name == "condition",
                    dots=False,
                )
            )
    blocks += _rows(charts)
    return Section(title="By layer", anchor="layers", blocks=tuple(blocks))


def _spectra(values: pl.DataFrame, kind: str, labels: Sequence[str]) -> Chart | None:
    """Singular values of one kind: by model where there are several, else by layer."""
    several = len(labels) > 1
    points: list[dict[str, Any]] = []
    layers = sorted({v for v in values["layer"].to_list() if v is not None})
    step = max((len(layers) - 1) / max(MOST_LAYERS - 1, 1), 1)
    shown = (
        sorted({layers[min(round(i * step), len(layers) - 1)] for i in range(MOST_LAYERS)})
        if layers
        else [None]
    )
    for label in labels if several else labels[:1]:
        of_model = values.filter(pl.col("model") == label)
        if several:
            points += _line(of_model, label)
        else:
            for layer in shown:
                chosen = of_model if layer is None else of_model.filter(pl.col("layer") == layer)
                points += _line(chosen, kind if layer is None else f"layer {layer}")
    if not points:
        return None
    return series_chart(
        points,
        name=f"spectrum-{file_slug(kind)}",
        title=kind,
        how_to_read="Mean over the matrices of each model." if several else "Some of the layers.",
        x_title="Place by size, share of r",
        y_title="σ / rms σ",
        log_y=True,
        dots=False,
    )


def _line(values: pl.DataFrame, series: str) -> list[dict[str, Any]]:
    if not len(values):
        return []
    scaled = values.with_columns(scaled=pl.col("value") / pl.col("value").pow(2).mean().sqrt().over("name"))
    means = scaled.group_by("place").agg(pl.col("scaled").mean()).sort("place")
    every = max(len(means) // MOST_POINTS, 1)
    chosen = [i for i in range(len(means)) if i % every == 0 or i < 5 or i == len(means) - 1]
    places, sigmas = means["place"].to_list(), means["scaled"].to_list()
    # Smaller values are rounding, and would stretch the axis.
    return [{"x": places[i], "y": sigmas[i], "series": series} for i in chosen if sigmas[i] > 1e-5]


def _every(matrices: pl.DataFrame, labels: Sequence[str]) -> Section:
    several = len(labels) > 1
    body = []
    for row in matrices.iter_rows(named=True):
        cells = [Cell(text=row["name"])] + ([Cell(text=row["model"])] if several else [])
        cells += [Cell(text=f"{row['rows']}×{row['columns']}"), Cell(text=count_text(row["rank"]))]
        cells += [Cell(text=number_text(row["largest"])), Cell(text=number_text(row["smallest"]))]
        cells += [Cell(text=number_text(row[name])) for name in MEASURES]
        body.append(tuple(cells))
    columns = [Column(label="Matrix", numeric=False)] + (
        [Column(label="Model", numeric=False)] if several else []
    )
    columns += [Column(label=label) for label in ("Shape", "Rank", "Largest σ", "Smallest σ")]
    columns += [Column(label=TITLES[name]) for name in MEASURES]
    table = Table(
        caption="Rank counts what exceeds the rounding of the stored dtype: σ > max(m, n) · eps · σ₁",
        columns=tuple(columns),
        rows=tuple(body),
    )
    return Section(title="Every matrix", anchor="matrices", blocks=(table,))
