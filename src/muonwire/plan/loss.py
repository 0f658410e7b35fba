"""What a recipe costs in loss beside dense Muon of the same work, out of the rows of evidence, with its range.

The formula is in docs/plan.md. In short: the cost is a line through a recipe's rows over ln h, where h is how many steps of a run
of 1500 lie between two synchronizations, moved by what more or fewer replicas cost local steps. The range is the root of the sum of
squares of what seeds, texts and distances from the rows leave open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muonwire.optim.settings import LocalSteps
from muonwire.plan.beside import Run, added_cost
from muonwire.plan.curve import Curve, between
from muonwire.plan.evidence import Beside, Row, Trend, beside, family_of, local_of, rows, trends
from muonwire.plan.exchanges import synchronizations

REFERENCE = "muon"
# Whose slope over ln h a recipe takes where it has one row alone.
BORROWED = {"demo": "distro", "psyche": "distro"}
BORROWED_BY_OTHERS = "one_bit_muon"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Expected loss over dense Muon's, less one.

    Args:
        expected: best guess.
        low, high: its range.
        lr: the rate of the row whose run was about as long.
        sources: the rows that it comes from: file, places in it, and recipe.
        extrapolated: in what it lies outside of the rows, in words; empty where it does not.
    """

    expected: float
    low: float
    high: float
    lr: float
    sources: tuple[str, ...]
    extrapolated: tuple[str, ...]


def expected_cost(
    recipe: str,
    *,
    replicas: int,
    steps: int,
    num_parameters: int,
    known: Sequence[Row] | None = None,
    known_beside: Sequence[Beside] | None = None,
    known_trends: Sequence[Trend] | None = None,
) -> Cost | None:
    """What a recipe costs in loss, where there is a row of its family; None where there is none.

    Args:
        recipe: in textual form.
        replicas, steps, num_parameters: of the run.
        known: the evidence. Default: what the package carries.
        known_beside: the rows of options beside the same recipe without them. Default: what the package carries.
        known_trends: how the cost of local steps moves with size and length. Default: what the package carries with its rows, none
            with others.
    """
    if known_trends is None:
        known_trends = trends() if known is None else ()
    known = rows() if known is None else known
    family = family_of(recipe)
    base = _base(known)
    own = _best([row for row in known if row.family == family and _is_like(row, base)])
    if not own:
        return None
    at = math.log(_spacing(local_of(recipe), steps, base.steps))
    points = _line(own, base.steps)

    def spacing_apart(row: Row) -> float:
        return abs(math.log(_spacing(local_of(row.recipe), row.steps, base.steps)) - at)

    nearest = min(own, key=spacing_apart)
    # Rates depend on the length of a run first.
    as_long = min(own, key=lambda row: (abs(math.log(steps / row.steps)), spacing_apart(row)))
    if family == REFERENCE:
        # What others are held against: only its seeds leave something open.
        return _cost(0.0, _seeds_spread(nearest, known, base), 0.0, 0.0, own, as_long, [], ())
    is_local = local_of(recipe) is not None
    unscaled = math.log(steps / synchronizations(local_of(recipe), steps))
    expected, below, above, extrapolated = _over_spacing(points, at, unscaled, family, known, base)
    moved, open_r, noted = _over_replicas(known, base, replicas, family, is_local=is_local)
    extrapolated += noted
    sizes = [row.num_parameters for row in own]
    lengths = [row.steps for row in own]
    by_trends = open_t = 0.0
    if is_local:
        by_trends, open_t = _over_trends(
            known_trends, family, {"num_parameters": num_parameters, "steps": steps}
        )
        sizes += [end for t in known_trends if t.of == "num_parameters" for end in (t.low, t.high)]
        lengths += [end for t in known_trends if t.of == "steps" for end in (t.low, t.high)]
    beyond = max(min(sizes) / num_parameters, num_parameters / max(sizes), 1.0)
    longer = max(steps / max(lengths), 1.0)
    if beyond > 1:
        extrapolated.append(f"{num_parameters:,} parameters ({between(sizes)} measured)")
    if not min(lengths) <= steps <= max(lengths):
        extrapolated.append(f"{steps:,} steps ({between(lengths)} measured)")
    # Each tenfold beyond what was measured leaves as much open as another text does.
    text = _text_spread(known, base)
    tenfolds = [text * math.log10(times) for times in (beyond, longer)]
    added = added_cost(
        Run(recipe=recipe, replicas=replicas, steps=steps, num_parameters=num_parameters),
        beside() if known_beside is None else known_beside,
        text=text,
        seeds=_widest_spread(known),
    )
    width = math.hypot(_seeds_spread(nearest, known, base), text, open_r, open_t, added.open, *tenfolds)
    expected += moved
    # A trend brings local steps nearer to dense Muon, and not past it.
    expected = max(expected + by_trends, min(expected, 0.0)) + added.expected
    extrapolated += added.extrapolated
    return _cost(expected, width, below, above, own, as_long, extrapolated, added.sources)


def _cost(
    expected: float,
    width: float,
    below: float,
    above: float,
    own: Sequence[Row],
    as_long: Row,
    extrapolated: Sequence[str],
    sources_beside: Sequence[str],
) -> Cost:
    """The cost with its range: ``width`` to both sides, ``below`` and ``above`` to one each."""
    return Cost(
        expected=expected,
        low=expected - math.hypot(width, below),
        high=expected + math.hypot(width, above),
        lr=as_long.lr,
        sources=(*(str(row) for row in own), *sources_beside),
        extrapolated=tuple(extrapolated),
    )


def _base(known: Sequence[Row]) -> Row:
    """Dense Muon where most recipes were compared: the setting that the others are seen from."""
    dense = [row for row in known if row.recipe == REFERENCE]
    return max(dense, key=lambda row: sum(_same_setting(row, other) for other in known))


def _same_setting(row: Row, other: Row) -> bool:
    return (row.task, row.replicas, row.steps, row.num_parameters) == (
        other.task,
        other.replicas,
        other.steps,
        other.num_parameters,
    )


def _is_like(row: Row, base: Row) -> bool:
    return row.task == base.task and row.replicas == base.replicas


def _best(found: Sequence[Row]) -> list[Row]:
    """Of rows of one recipe and setting, which differ in how rates were sought, that of the lower cost."""
    best: dict[tuple[str, int, int, int], Row] = {}
    for row in found:
        key = (row.recipe, row.replicas, row.steps, row.num_parameters)
        if key not in best or row.cost < best[key].cost:
            best[key] = row
    return list(best.values())


def _spacing(local: LocalSteps | None, steps: int, base_steps: int) -> float:
    """h: steps between two synchronizations, of a run that a shorter one stands for as a whole."""
    return max(steps, base_steps) / synchronizations(local, steps)


def _line(found: Sequence[Row], base_steps: int) -> Curve:
    return Curve(
        points=sorted(
            (math.log(_spacing(local_of(row.recipe), row.steps, base_steps)), row.cost) for row in found
        )
    )


def _over_spacing(
    points: Curve, at: float, unscaled: float, family: str, known: Sequence[Row], base: Row
) -> tuple[float, float, float, list[str]]:
    """The cost at ln h = ``at``, what is open below and above it, and what is extrapolated.

    ``unscaled`` is ln of the steps that do lie between two synchronizations, fewer than h in a short run.
    """
    line, noted = points, []
    if len(points.points) < 2:
        lender = BORROWED.get(family, BORROWED_BY_OTHERS)
        theirs = _line(_best([r for r in known if r.family == lender and _is_like(r, base)]), base.steps)
        (first, *_, last) = theirs.points
        slope = (last[1] - first[1]) / (last[0] - first[0])
        (x, y) = points.points[0]
        line = Curve(points=[(x, y), (x + 1, y + slope)])
    if points.is_outside(at):
        ends = [float(f"{math.exp(x):.3g}") for x, _ in points.points]
        noted = [f"{float(f'{math.exp(at):.3g}'):,g} steps a synchronization ({between(ends)} measured)"]
    off = abs(line.slope(at)) * points.distance(at)
    first_cost = points.points[0][1]
    if at < points.points[0][0] and noted:
        # Rarer synchronizations cost more; oftener ones may save what they cost here, and no more.
        return first_cost, min(off, abs(first_cost)), min(off, abs(first_cost)), noted
    expected = line.at(at)
    if noted:
        below = above = off
    else:
        around = points.around(at)
        below = max(min(2 * off, expected - min(around)), 0.0)
        above = max(min(2 * off, max(around) - expected), 0.0)
    # In a short run a local step may cost as it does in a long one.
    as_long = first_cost if unscaled < points.points[0][0] else line.at(min(unscaled, at))
    return expected, max(below, expected - as_long), above, noted


def _over_replicas(
    known: Sequence[Row], base: Row, replicas: int, family: str, *, is_local: bool
) -> tuple[float, float, list[str]]:
    """What other numbers of replicas add to the cost of local steps, what is left open, and what is extrapolated.

    It is taken from the family's own rows where it has some for other numbers; else from the recipe that was measured with most,
    for all local ones, while for recipes that synchronize in each step all of it is left open.
    """
    same = [
        row
        for row in known
        if row.task == base.task and row.steps == base.steps and row.num_parameters == base.num_parameters
    ]
    costs: dict[str, dict[int, float]] = {}
    for row in _best(same):
        if row.recipe != REFERENCE:
            costs.setdefault(row.recipe, {})[row.replicas] = row.cost
    told = [recipe for recipe, found in costs.items() if base.replicas in found]
    own = [recipe for recipe in told if family_of(recipe) == family and len(costs[recipe]) > 1]
    by_replicas = costs[max(own or told, key=lambda recipe: len(costs[recipe]))]
    here = by_replicas[base.replicas]
    line = Curve(points=sorted((math.log(r), cost - here) for r, cost in by_replicas.items()))
    at = math.log(replicas)
    outside = line.is_outside(at)
    open_r = abs(line.slope(at)) * line.distance(at) * (1.0 if outside else 0.5)
    measured = sorted(by_replicas)
    if is_local or own:
        return (
            line.at(at),
            open_r,
            [f"{replicas} replicas ({between(measured)} measured)"] if outside else [],
        )
    if replicas == base.replicas:
        return 0.0, 0.0, []
    return 0.0, math.hypot(line.at(at), open_r), [f"{replicas} replicas ({base.replicas} measured)"]


def _over_trends(known: Sequence[Trend], family: str, run: dict[str, int]) -> tuple[float, float]:
    """What the size and the length of a run add to the cost of local steps, and what is left open.

    For recipes other than those that the trend was fitted to, all of it is left open besides.
    """
    moved, left = 0.0, [0.0]
    for trend in known:
        doublings = trend.doublings(run[trend.of])
        added = trend.per_doubling * doublings
        moved += added
        left += [trend.error * doublings, 0.0 if family.startswith(trend.recipe) else added]
    return moved, math.hypot(*left)


def _text_spread(known: Sequence[Row], base: Row) -> float:
    """How far a recipe's cost on another text lies from that on the base's, at most."""
    apart = [
        abs(row.cost - other.cost)
        for row in known
        for other in known
        if row.task == base.task != other.task
        and row.recipe == other.recipe
        and (row.replicas, row.steps, row.num_parameters)
        == (other.replicas, other.steps, other.num_parameters)
    ]
    return max(apart, default=0.0)


def _seeds_spread(row: Row, known: Sequence[Row], base: Row) -> float:
    """Of the row and of dense Muon; with one seed, the widest that was measured."""
    own = row.spread if row.spread is not None else _widest_spread(known)
    return math.hypot(own, base.spread or 0.0)


def _widest_spread(known: Sequence[Row]) -> float:
    return max((r.spread for r in known if r.spread is not None), default=0.0)
