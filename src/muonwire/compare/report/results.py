"""The results of a comparison, read from summary rows and curves, checked, and ranked."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from statistics import fmean
from typing import Any

import polars as pl

from muonwire.errors import UsageError

CURVE_COLUMNS: dict[str, Any] = {
    "recipe": pl.String,
    "lr": pl.Float64,
    "seed": pl.Int64,
    "best": pl.Boolean,
    "step": pl.Int64,
    "train_loss": pl.Float64,
    "eval_loss": pl.Float64,
    "bytes_sent": pl.Float64,
    "bytes_received": pl.Float64,
    "bytes_egress": pl.Float64,
    "measured_s": pl.Float64,
    "link_s": pl.Float64,
}


@dataclass(frozen=True, kw_only=True)
class SeedResult:
    """One recipe at its chosen rate with one seed; costs are means per replica and optimizer step.

    ``link_s_per_step`` is the modelled time of a step's bytes and messages alone, without computation. ``diagnostics`` are the
    run's measures, empty where it took none.
    """

    recipe: str
    seed: int
    lr: float
    replicas: int
    steps: int
    final_eval_loss: float | None
    num_parameters: int
    bytes_sent_per_step: float
    bytes_received_per_step: float
    bytes_egress_per_step: float
    messages_per_step: float
    bits_per_parameter_step: float
    compute_s_per_step: float
    optimizer_s_per_step: float
    exchange_s_per_step: float
    link_s_per_step: float
    diverged: bool
    options: Mapping[str, Any]
    chain: str
    lr_at_grid_edge: bool
    diagnostics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecipeResult:
    """All seeds of one recipe; ``index`` is its place in the summary and decides its colour."""

    recipe: str
    index: int
    seeds: tuple[SeedResult, ...]

    @property
    def num_diverged(self) -> int:
        """Seeds without a finite final loss."""
        return sum(seed.diverged for seed in self.seeds)

    @property
    def ranked(self) -> bool:
        """Whether every seed finished; the mean over the seeds that did would flatter a recipe that diverges."""
        return self.num_diverged == 0

    @property
    def losses(self) -> tuple[float, ...]:
        """Final evaluation loss of each seed that finished."""
        return tuple(s.final_eval_loss for s in self.seeds if s.final_eval_loss is not None)

    @property
    def loss(self) -> float | None:
        """Mean final evaluation loss over the seeds; ``None`` unless every seed finished."""
        return fmean(self.losses) if self.ranked else None

    @property
    def name(self) -> str:
        """The recipe without its options."""
        return self.recipe.partition("(")[0]

    @property
    def first(self) -> SeedResult:
        """The first seed, for fields that all seeds of a recipe share."""
        return self.seeds[0]

    def mean(self, value: Callable[[SeedResult], float]) -> float:
        """Mean of ``value`` over the seeds."""
        return fmean(value(seed) for seed in self.seeds)

    @property
    def bits(self) -> float:
        """Bits sent per parameter and step."""
        return self.mean(lambda seed: seed.bits_per_parameter_step)

    def diagnostic(self, measure: str) -> float | None:
        """Mean of a measure over the seeds that have it."""
        values = [v for seed in self.seeds if (v := seed.diagnostics.get(measure)) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True, kw_only=True)
class Results:
    """A comparison: its recipes in summary order, and one row of ``curves`` per evaluation point and run."""

    recipes: tuple[RecipeResult, ...]
    curves: pl.DataFrame
    # Likewise by link, where links were asked for; see ``report.links.LINK_COLUMNS``.
    links: pl.DataFrame | None = None

    @property
    def ranking(self) -> tuple[RecipeResult, ...]:
        """The recipes whose every seed finished, lowest mean final loss first."""
        finished = [(r.loss, r.index, r) for r in self.recipes if r.loss is not None]
        return tuple(r for _, _, r in sorted(finished, key=lambda item: item[:2]))

    @property
    def ordered(self) -> tuple[RecipeResult, ...]:
        """The ranking, then the recipes that diverged in summary order."""
        return self.ranking + tuple(r for r in self.recipes if not r.ranked)

    @property
    def num_seeds(self) -> int:
        """The largest number of seeds of a recipe."""
        return max(len(r.seeds) for r in self.recipes)

    def find(self, recipe: str) -> RecipeResult | None:
        """The result of ``recipe``, or ``None``."""
        return next((r for r in self.recipes if r.recipe == recipe), None)

    def best_curves(self) -> pl.DataFrame:
        """The curves at each recipe's chosen rate."""
        return self.curves.filter(pl.col("best"))

    def mean_curves(self) -> pl.DataFrame:
        """Mean over the seeds at the chosen rate, by recipe and step, where every seed has a loss.

        Adds ``low`` and ``high``, the extremes of the evaluation loss over the seeds.
        """
        curves = self.best_curves()
        costs = ["train_loss", "bytes_sent", "bytes_received", "bytes_egress", "measured_s", "link_s"]
        return (
            curves.with_columns(pl.col("seed").n_unique().over("recipe").alias("num_seeds"))
            .group_by("recipe", "step", maintain_order=True)
            .agg(
                pl.col("eval_loss").mean(),
                pl.col("eval_loss").min().alias("low"),
                pl.col("eval_loss").max().alias("high"),
                pl.col("eval_loss").count().alias("num_losses"),
                pl.col("num_seeds").first(),
                *(pl.col(name).mean() for name in costs),
            )
            .filter(pl.col("num_losses") == pl.col("num_seeds"))
            .drop("num_losses")
        )


def is_below(lower: RecipeResult, higher: RecipeResult) -> bool | None:
    """Whether every seed of ``lower`` ended below every one of ``higher``; ``None`` with a single seed."""
    if min(len(lower.losses), len(higher.losses)) < 2:
        return None
    return max(lower.losses) < min(higher.losses)


def read_results(
    summary: Sequence[Mapping[str, Any]], curves: pl.DataFrame, links: pl.DataFrame | None = None
) -> Results:
    """Check ``summary`` and ``curves``, and join them.

    A run counts as diverged when its row says so, or when its final loss is missing or not finite.

    Args:
        summary: one row per recipe and seed at the recipe's chosen rate, with the fields of ``SeedResult``.
        curves: one row per evaluation point and run, with ``CURVE_COLUMNS``; bytes and seconds are
            cumulative, and ``link_s`` is measured computation plus the modelled link.
        links: likewise for each link of ``--emulate``. Default: none.

    Raises:
        UsageError: for an empty summary, a missing field or column, or a recipe and seed named twice.
    """
    if not summary:
        raise UsageError("read_results: summary is empty; it needs one row per recipe and seed")
    missing = [name for name in CURVE_COLUMNS if name not in curves.columns]
    if missing:
        raise UsageError(f"read_results: curves lacks the columns {missing}; it needs {list(CURVE_COLUMNS)}")
    by_recipe: dict[str, list[SeedResult]] = {}
    for row in summary:
        seed = _seed_result(row)
        seeds = by_recipe.setdefault(seed.recipe, [])
        if any(other.seed == seed.seed for other in seeds):
            raise UsageError(
                f"read_results: summary names recipe {seed.recipe!r} with seed {seed.seed} twice; "
                "it takes one row per recipe and seed, at the chosen rate"
            )
        seeds.append(seed)
    recipes = tuple(
        RecipeResult(recipe=recipe, index=index, seeds=tuple(seeds))
        for index, (recipe, seeds) in enumerate(by_recipe.items())
    )
    return Results(
        recipes=recipes,
        curves=_clean(curves, recipes=list(by_recipe)),
        links=None if links is None or links.is_empty() else links,
    )


def _seed_result(row: Mapping[str, Any]) -> SeedResult:
    names = [f.name for f in fields(SeedResult) if f.default_factory is MISSING]
    missing = [name for name in names if name not in row]
    if missing:
        raise UsageError(f"read_results: a summary row lacks {missing}; it needs {names}")
    values = {f.name: row[f.name] for f in fields(SeedResult) if f.name in row}
    loss = values["final_eval_loss"]
    finite = loss is not None and math.isfinite(loss)
    values["diverged"] = bool(values["diverged"]) or not finite
    values["final_eval_loss"] = None if values["diverged"] else float(loss)
    return SeedResult(**values)


def _clean(curves: pl.DataFrame, *, recipes: list[str]) -> pl.DataFrame:
    losses = [
        pl.when(pl.col(name).is_finite()).then(pl.col(name)).otherwise(None).alias(name)
        for name in ("train_loss", "eval_loss")
    ]
    return (
        curves.select(pl.col(name).cast(kind) for name, kind in CURVE_COLUMNS.items())
        # Rows of a recipe without a summary have no chosen rate, and no colour.
        .filter(pl.col("recipe").is_in(recipes))
        .with_columns(losses)
        .sort(
            pl.col("recipe").replace_strict({r: i for i, r in enumerate(recipes)}, return_dtype=pl.Int64),
            "lr",
            "seed",
            "step",
        )
    )
