"""The page of one model's spectra, or of several beside each other."""

import statistics
from collections.abc import Sequence
from typing import Any

import polars as pl

from muonwire.pages import Block, Chart, Page, Row, Section, text_table
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
    kinds = dict.fromkeys(matrices["kind"].to_list())
    values = pl.concat([m.values for m in measured])
    charts = [c for kind in kinds if (c := _spectra(values.filter(pl.col("kind") == kind), kind, labels))]
    by_kind = Section(
        title="Singular values by kind",
        anchor="spectra",
        lead="σ over the root of the mean σ², against their place by size: 0 the largest, 1 the smallest.",
        blocks=_rows(charts),
    )
    several = len(labels) > 1
    return Page(
        title="Singular values: " + ", ".join(labels),
        kicker="muonwire spectra show",
        lead=f"{count_text(len(matrices) // len(labels))} weight matrices"
        + (f" of each of {len(labels)} models, beside each other." if several else ", by layer and kind."),
        facts=tuple(facts),
        sections=(
            _summary(matrices, labels),
            _by_layer(matrices, labels),
            by_kind,
            _every(matrices, labels),
        ),
        footer="; ".join(f"{TITLES[name]}: {formula}" for name, formula in MEASURES.items()) + ".",
    )


def _rows(charts: Sequence[Chart]) -> tuple[Block, ...]:
    return tuple(Row(charts=tuple(charts[i : i + 2])) for i in range(0, len(charts), 2))


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
    names = ["Kind", "Model"] if len(labels) > 1 else ["Kind"]
    rows = (
        (*(kind, label)[: len(names)], count_text(count), *map(number_text, medians.values()))
        for kind, label, count, medians in summary_rows(matrices, labels)
    )
    columns = [*names, "Matrices", *(TITLES[name] for name in MEASURES)]
    table = text_table("Medians over the layers", columns, rows, names=len(names))
    return Section(title="By kind", anchor="kinds", blocks=(table,))


def _by_layer(matrices: pl.DataFrame, labels: Sequence[str]) -> Section:
    several = len(labels) > 1
    inside = matrices.filter(pl.col("layer").is_not_null())
    by = "model" if several else "kind"
    order = labels if several else list(dict.fromkeys(inside["kind"].to_list()))
    charts = []
    for name in MEASURES:
        medians = inside.group_by(by, "layer").agg(pl.col(name).median()).rows()
        points = [
            {"x": layer, "y": median, "series": series}
            for series, layer, median in sorted(medians, key=lambda row: (order.index(row[0]), row[1]))
        ]
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
    return Section(title="By layer", anchor="layers", blocks=_rows(charts))


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
    names = ["Matrix", "Model"] if len(labels) > 1 else ["Matrix"]
    rows = (
        (
            *(row["name"], row["model"])[: len(names)],
            f"{row['rows']}×{row['columns']}",
            count_text(row["rank"]),
            *(number_text(row[name]) for name in ("largest", "smallest", *MEASURES)),
        )
        for row in matrices.iter_rows(named=True)
    )
    caption = "Rank counts what exceeds the rounding of the stored dtype: σ > max(m, n) · eps · σ₁"
    columns = [*names, "Shape", "Rank", "Largest σ", "Smallest σ", *(TITLES[name] for name in MEASURES)]
    table = text_table(caption, columns, rows, names=len(names))
    return Section(title="Every matrix", anchor="matrices", blocks=(table,))
