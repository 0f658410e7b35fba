"""A law of the gap to dense Muon, fitted to all parts of the grid: what replicas, bits, size and text add."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.scale.plan import PARTS
from benchmarks.scale.report import Line, lines_of, read
from benchmarks.scale.texts import DATA

from muonwire.recipes import parse_recipe

# What the law is told at: the middle of what is measured.
REPLICAS, BATCH, SIZE, TEXT, STEPS = 8, 8, 123_200, "kjv", 1500


@dataclass(frozen=True, kw_only=True)
class Point:
    """A recipe in a setting, as the law sees it.

    Args:
        form: "all" send all, or in "turns".
        replicas, batch, size, data, steps: of the setting.
        period: steps from one sending of an entry to the next, by one replica: H times the parts.
        over: percent above dense Muon, over the seeds.
    """

    form: str
    replicas: int
    batch: int
    size: int
    data: str
    steps: int
    period: int
    over: float


@dataclass(frozen=True, kw_only=True)
class Term:
    """What one change adds to the gap.

    Args:
        name: of the change.
        percent: what it adds.
        error: its standard error.
    """

    name: str
    percent: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """Least squares of the gap.

    Args:
        terms: what the gap is at the middle, and what changes add.
        points: that it is fitted to.
        residual: root mean square of what it leaves, in percent, by degrees of freedom.
    """

    terms: tuple[Term, ...]
    points: tuple[Point, ...]
    residual: float


def points_of(evidence: Path) -> Iterator[Point]:
    """Of one_bit_muon, where all replicas draw from all of a text; a setting that several parts have counts once.

    Fewer replicas than parts send more bits, and are none.
    """
    seen: set[tuple[str, str]] = set()
    for name in PARTS:
        rows = read(evidence / f"{name}.parquet")
        for line in lines_of(rows):
            key = line.setting, line.recipe
            if not line.over or key in seen:
                continue
            seen.add(key)
            if (point := _point(line)) is not None:
                yield point


def _point(line: Line) -> Point | None:
    name, options = parse_recipe(line.recipe)
    first: dict[str, Any] = line.runs[0]
    kind = DATA[first["data"]]
    if name != "one_bit_muon" or "codec" in options or kind.own or kind.images:
        return None
    if first["replicas"] < int(options.get("parts", 1)):
        return None
    return Point(
        form="turns" if "parts" in options else "all",
        replicas=first["replicas"],
        batch=first["batch"],
        size=first["num_parameters"],
        data=first["data"],
        steps=first["planned_steps"],
        period=int(options["interval"]) * int(options.get("parts", 1)),
        over=line.mean_over,
    )


def columns(points: Sequence[Point]) -> dict[str, list[float]]:
    """By name of a change, how much of it each point has; changes that no point has are left out.

    The gap grows as the square root of the steps from one sending of an entry to the next.
    """
    found = {
        "all send all, H = 11": [float(p.form == "all") for p in points],
        "a quarter each in turns, H = 3": [float(p.form == "turns") for p in points],
        "twice as many replicas, all": [math.log2(p.replicas / REPLICAS) * (p.form == "all") for p in points],
        "twice as many replicas, turns": [
            math.log2(p.replicas / REPLICAS) * (p.form == "turns") for p in points
        ],
        "a quarter of the bits, all": [(math.sqrt(p.period / 11) - 1) * (p.form == "all") for p in points],
        "a quarter of the bits, turns": [
            (math.sqrt(p.period / 12) - 1) * (p.form == "turns") for p in points
        ],
        "twice the batch of a replica": [math.log2(p.batch / BATCH) for p in points],
        "four times the parameters": [math.log2(p.size / SIZE) / 2 for p in points],
        "four times the steps": [math.log2(p.steps / STEPS) / 2 for p in points],
        **{
            f"the text {DATA[data].label} in place of {DATA[TEXT].label}": [
                float(p.data == data) for p in points
            ]
            for data in dict.fromkeys(p.data for p in points)
            if data != TEXT
        },
    }
    return {name: column for name, column in found.items() if any(column)}


def fit(points: Sequence[Point]) -> Law | None:
    """The law; None where there are not more points than terms, or two terms cannot be told apart."""
    made = columns(points)
    x = np.array(list(made.values()), dtype=float).reshape(len(made), len(points)).T
    y = np.array([p.over for p in points])
    free = len(points) - len(made)
    if free < 1 or np.linalg.matrix_rank(x) < len(made):
        return None
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    variance = float(np.square(y - x @ solution).sum()) / free
    errors = np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    terms = tuple(
        Term(name=name, percent=float(p), error=float(e))
        for name, p, e in zip(made, solution, errors, strict=True)
    )
    return Law(terms=terms, points=tuple(points), residual=math.sqrt(variance))


def section(evidence: Path) -> str:
    """The law as a table in Markdown."""
    law = fit(list(points_of(evidence)))
    if law is None:
        return "There are too few runs for it.\n"
    text = "| | percent above dense Muon | standard error |\n|---|--:|--:|\n"
    for term in law.terms:
        text += f"| {term.name} | {term.percent:+.2f} | {term.error:.2f} |\n"
    free = len(law.points) - len(law.terms)
    left = f"what is left has a root mean square of {law.residual:.2f} %"
    middle = f"{REPLICAS} replicas of {BATCH} sequences, {SIZE:,} parameters, {STEPS} steps, on the {DATA[TEXT].label} text"
    bits = "With the bits it grows as the square root of the steps from one sending of an entry to the next"
    return f"{text}\n{len(law.points)} settings, {free} more than terms; {left}. The gap of a form is that at {middle}. {bits}.\n"
