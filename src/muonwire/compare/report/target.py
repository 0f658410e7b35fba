"""The target, a loss that recipes are compared at, and what each spent to reach it."""

from dataclasses import dataclass

import polars as pl

from muonwire.compare.report.results import Results


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What a recipe had spent at its first evaluation at or below the target; bytes are per replica."""

    recipe: str
    step: int
    bytes_sent: float
    link_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loss to reach.

    Args:
        loss: the loss.
        reference: the recipe that ended there.
        named: whether the setting named the reference; if not, it is the recipe with the highest final loss.
        reached: by recipe; a recipe that never reached it is absent.
    """

    loss: float
    reference: str
    named: bool
    reached: dict[str, Reached]


def find_target(results: Results, *, reference: str | None) -> Target | None:
    """The final loss of the reference if it finished, or else the highest one of those that did.

    Only recipes whose every seed finished take part, by the mean of their seeds; ``None`` for fewer than two.
    """
    ranked = [r.recipe for r in results.ranking]
    means = results.mean_curves().filter(pl.col("recipe").is_in(ranked))
    ends = {
        str(recipe): float(loss)
        for recipe, loss in means.group_by("recipe", maintain_order=True)
        .agg(pl.col("eval_loss").last())
        .rows()
    }
    if len(ends) < 2:
        return None
    named = reference in ends
    if reference not in ends:
        reference = max(ends, key=lambda recipe: ends[recipe])
    assert reference is not None
    loss = ends[reference]
    return Target(loss=loss, reference=reference, named=named, reached=reached_by(results, loss))


def reached_by(results: Results, loss: float) -> dict[str, Reached]:
    """What each ranked recipe had spent at its first evaluation at or below ``loss``, as means over its seeds."""
    ranked = [r.recipe for r in results.ranking]
    means = results.mean_curves().filter(pl.col("recipe").is_in(ranked))
    reached: dict[str, Reached] = {}
    for row in means.filter(pl.col("eval_loss") <= loss).iter_rows(named=True):
        # The rows of a recipe are in the order of its steps, so the first one is where it reached the target.
        reached.setdefault(
            row["recipe"],
            Reached(
                recipe=row["recipe"],
                step=row["step"],
                bytes_sent=row["bytes_sent"] or 0.0,
                link_s=row["link_s"] or 0.0,
                measured_s=row["measured_s"] or 0.0,
            ),
        )
    return reached
