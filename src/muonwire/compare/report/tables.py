"""The tables and tiles of a comparison."""

from collections.abc import Callable, Sequence
from operator import attrgetter

from muonwire.compare.report.links import link_tile
from muonwire.compare.report.marks import swatch
from muonwire.compare.report.results import RecipeResult, Results
from muonwire.compare.report.setting import ReportSetting
from muonwire.compare.report.target import Target
from muonwire.pages.blocks import Cell, Column, Table, Tile, Tiles, text_table
from muonwire.pages.units import bytes_text, digits_text, loss_text, lr_text, seconds_text

_MISSING = "–"

_Column = tuple[Column, list[Cell]]

# What a step costs a replica: the heading of each column, the field of the results, and how it is written.
_COSTS = (
    ("Sent", "per step", "bytes_sent_per_step", bytes_text),
    ("Received", "per step", "bytes_received_per_step", bytes_text),
    ("Egress", "per step", "bytes_egress_per_step", bytes_text),
    ("Messages", "per step", "messages_per_step", digits_text),
    ("Compute", "measured", "compute_s_per_step", seconds_text),
    ("Optimizer", "measured", "optimizer_s_per_step", seconds_text),
    ("Exchange", "measured here", "exchange_s_per_step", seconds_text),
    ("Link", "modelled", "link_s_per_step", seconds_text),
)


def headline_tiles(results: Results, *, setting: ReportSetting, target: Target | None) -> Tiles | None:
    """The lowest loss, and the fewest bytes and least link time to the target; ``None`` if none finished."""
    if not results.ranking:
        return None
    best = results.ranking[0]
    assert best.loss is not None
    tiles = [
        Tile(label="Lowest final loss", value=loss_text(best.loss), detail=best.recipe, swatch=swatch(best)),
    ]
    reached = list(target.reached.values()) if target else []
    if target and reached:
        to = loss_text(target.loss)
        if all(r.bytes_sent > 0 for r in reached):
            least = min(reached, key=lambda r: r.bytes_sent)
            label = f"Fewest bytes per replica to a loss of {to}"
            tiles.append(_tile(results, label, bytes_text(least.bytes_sent), least.recipe))
        if all(r.link_s > 0 for r in reached):
            least = min(reached, key=lambda r: r.link_s)
            label = f"Least time to {to} at {setting.link}, modelled"
            tiles.append(_tile(results, label, seconds_text(least.link_s), least.recipe))
    measured = link_tile(results, target)
    tiles += [measured] if measured else []
    return Tiles(tiles=tuple(tiles))


def _tile(results: Results, label: str, value: str, recipe: str) -> Tile:
    result = results.find(recipe)
    assert result is not None
    return Tile(label=label, value=value, detail=recipe, swatch=swatch(result))


def results_table(results: Results, *, setting: ReportSetting, target: Target | None) -> Table:
    """Loss, rate, traffic and the costs of reaching the target, by recipe; lowest loss first."""
    recipes = results.ordered
    columns: list[_Column] = [
        (Column(label="Final loss", unit="evaluation"), _loss_cells(recipes)),
        (Column(label="Learning rate", unit="best of grid"), [_rate_cell(r) for r in recipes]),
        _means(recipes, "Bits", "per parameter, step", "bits_per_parameter_step", digits_text),
        _means(recipes, "Sent", "per replica, step", "bytes_sent_per_step", bytes_text),
    ]
    if target:
        to = f"to {loss_text(target.loss)}"
        reached = [target.reached.get(r.recipe) for r in recipes]
        sent = [r.bytes_sent if r else None for r in reached]
        link_s = [r.link_s if r else None for r in reached]
        columns += [
            (Column(label="Sent in all", unit=f"per replica, {to}"), _cells(recipes, sent, text=bytes_text)),
            (
                Column(label=f"Time at {setting.link}", unit=f"{to}, modelled"),
                _cells(recipes, link_s, text=seconds_text),
            ),
        ]
    notes = ["The best value of a column is marked; a recipe that diverged is left out of that."]
    if results.num_seeds > 1:
        notes.append(
            f"Final loss: mean over {results.num_seeds} seeds, and below it their lowest and highest."
        )
    if target:
        notes.append(
            f"{loss_text(target.loss)} is where {target.reference} ended; a dash means that a recipe never reached it."
        )
    if any(s.lr_at_grid_edge for r in results.recipes for s in r.seeds):
        notes.append(
            "“Edge”: the best rate is the lowest or highest of the grid, so a wider grid may do better."
            if not setting.lr_searched
            else "“Edge”: the best rate is the lowest or highest of the grid that was searched before, or not the one that was "
            "best then; other rates may do better."
        )
    return _table("Results by recipe, lowest loss first", recipes, columns, notes=notes)


def costs_table(results: Results) -> Table:
    """Traffic and time of a step, by recipe; lowest loss first."""
    recipes = results.ordered
    columns = [_means(recipes, *cost) for cost in _COSTS]
    return _table(
        "Cost of a step by recipe, per replica",
        recipes,
        columns,
        notes=[
            "Means over the seeds, the replicas and the steps; a recipe that exchanges only "
            "every so many steps has fewer per step."
        ],
    )


def _table(
    caption: str, recipes: Sequence[RecipeResult], columns: Sequence[_Column], *, notes: Sequence[str]
) -> Table:
    heads, cells = zip(*columns, strict=True)
    names = [Cell(text=r.recipe, swatch=swatch(r)) for r in recipes]
    return text_table(caption, ("Recipe", *heads), zip(names, *cells, strict=True), notes=notes)


def _means(
    recipes: Sequence[RecipeResult], label: str, unit: str, cost: str, text: Callable[[float], str]
) -> _Column:
    """The column of a cost of a step, a mean over the seeds."""
    means = [recipe.mean(attrgetter(cost)) for recipe in recipes]
    return Column(label=label, unit=unit), _cells(recipes, means, text=text)


def _cells(
    recipes: Sequence[RecipeResult], values: Sequence[float | None], *, text: Callable[[float], str]
) -> list[Cell]:
    best = _best(recipes, values)
    # Values that read the same are equally good.
    best_text = None if best is None else text(best)
    return [
        Cell(text=_MISSING)
        if number is None
        else Cell(text=text(number), best=recipe.ranked and text(number) == best_text)
        for recipe, number in zip(recipes, values, strict=True)
    ]


def _best(recipes: Sequence[RecipeResult], values: Sequence[float | None]) -> float | None:
    """The smallest value of the ranked recipes; ``None`` if they are all alike."""
    ranked = [v for r, v in zip(recipes, values, strict=True) if r.ranked and v is not None]
    return min(ranked) if len(set(ranked)) > 1 else None


def _loss_cells(recipes: Sequence[RecipeResult]) -> list[Cell]:
    best = _best(recipes, [r.loss for r in recipes])
    cells = []
    for recipe in recipes:
        if recipe.loss is None:
            number = len(recipe.seeds)
            detail = f"{recipe.num_diverged} of {number} seeds" if number > 1 else ""
            cells.append(Cell(text="", flag="diverged", detail=detail))
            continue
        low, high = min(recipe.losses), max(recipe.losses)
        detail = f"{loss_text(low)} to {loss_text(high)}" if len(recipe.losses) > 1 else ""
        cells.append(Cell(text=loss_text(recipe.loss), detail=detail, best=recipe.loss == best))
    return cells


def _rate_cell(recipe: RecipeResult) -> Cell:
    rates = sorted({seed.lr for seed in recipe.seeds})
    edge = any(seed.lr_at_grid_edge for seed in recipe.seeds)
    return Cell(text=", ".join(lr_text(lr) for lr in rates), flag="edge" if edge else "")
