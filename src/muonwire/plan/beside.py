"""What options cost that were only measured beside the same recipe without them: fragments and delay, and who averages.

The formulas are in docs/plan.md.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from muonwire.optim.settings import LocalSteps
from muonwire.plan.curve import Curve, between
from muonwire.plan.evidence import CODECS, MEANS, SHARED_SCALE, STREAMING, Beside, local_of, plain_of
from muonwire.plan.exchanges import interval_of
from muonwire.recipes import parse_recipe


@dataclass(frozen=True, kw_only=True)
class Added:
    """What is added to a recipe's cost.

    Args:
        expected: best guess.
        open: what is left open, to both sides.
        sources: the rows that it comes from.
        extrapolated: in what it lies outside of them, in words.
    """

    expected: float = 0.0
    open: float = 0.0
    sources: tuple[str, ...] = ()
    extrapolated: tuple[str, ...] = ()

    def __add__(self, other: "Added") -> "Added":
        return Added(
            expected=self.expected + other.expected,
            open=math.hypot(self.open, other.open),
            sources=self.sources + other.sources,
            extrapolated=self.extrapolated + other.extrapolated,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The run that a cost is expected of."""

    recipe: str
    replicas: int
    steps: int
    num_parameters: int

    @property
    def name(self) -> str:
        """Of the recipe."""
        return parse_recipe(self.recipe)[0]


def added_cost(run: Run, known: Sequence[Beside], *, text: float, seeds: float) -> Added:
    """What the run's options add to the cost of the same recipe without them.

    Args:
        run: with its options.
        known: rows of such options.
        text: what another text leaves open; taken for what nothing was measured of.
        seeds: the widest range of seeds that was measured, half of it.
    """
    return _of_means(run, known, text=text, seeds=seeds) + _of_streaming(run, known, text=text, seeds=seeds)


def _of_means(run: Run, known: Sequence[Beside], *, text: float, seeds: float) -> Added:
    """Without loss it is the gather's cost; where there is no row of other means, as much is open as for another text."""
    _, given = parse_recipe(run.recipe)
    _, plain = parse_recipe(plain_of(run.recipe))
    shares = any(given.get(key) == SHARED_SCALE and key not in plain for key in CODECS)
    means = given.get("means", "gather")
    if means == "auto":
        means = "lossless" if shares else "recompressed"
    if means != "recompressed" and not shares:
        return Added()
    alike = [
        row
        for row in known
        if parse_recipe(row.recipe)[0] == run.name
        and parse_recipe(row.recipe)[1].get("means") == ("lossless" if shares else means)
        and parse_recipe(row.recipe)[1].get("mean_codec") == given.get("mean_codec")
    ]
    if alike:
        row = min(alike, key=lambda r: abs(math.log(r.replicas / run.replicas)))
        apart = _apart(run, row, what=f"means={row.recipe.split('means=')[1].split(',')[0].rstrip(')')}")
        return Added(
            expected=row.cost,
            open=math.hypot(row.spread or seeds, abs(row.cost) if apart else 0.0),
            sources=(str(row),),
            extrapolated=apart,
        )
    if means != "recompressed":
        return Added(open=seeds, extrapolated=("a scale that the replicas share (one of each measured)",))
    return Added(open=text, extrapolated=("means='recompressed' (not measured)",))


def _of_streaming(run: Run, known: Sequence[Beside], *, text: float, seeds: float) -> Added:
    """A line over the delay between the rows with as many fragments, and beyond them as much more as with one fragment."""
    local = local_of(run.recipe)
    if local is None or not local.streams:
        return Added()
    found = [(row, own) for row in known if (own := _streaming_of(row)) is not None]
    if not found:
        return Added(open=text, extrapolated=("fragments and delay (not measured)",))
    noted, lent = [], 0.0
    mixes = sorted({own.mix for _, own in found if own.delay}) or [local.mix]
    mix = min(mixes, key=lambda value: abs(value - local.mix))
    if local.delay and mix != local.mix:
        noted.append(f"mix={local.mix:g} ({between(mixes)} measured)")
    of_mix = [(row, own) for row, own in found if not own.delay or own.mix == mix]
    counts = sorted({1, *(own.fragments for _, own in of_mix)})
    count = min(counts, key=lambda value: abs(math.log(value / local.fragments)))
    own_line, of_one = _over_delay(of_mix, count), _over_delay(of_mix, 1)
    reach = own_line.points[-1][0]
    expected = own_line.at(min(local.delay, reach))
    if local.delay > reach:
        lent = of_one.at(local.delay) - of_one.at(reach)
        noted.append(f"a delay of {local.delay} with {local.fragments} fragments (up to {reach:g} measured)")
    expected += lent
    others = 0.0
    if count != local.fragments:
        noted.append(f"{local.fragments} fragments ({', '.join(map(str, counts))} measured)")
        others = of_one.at(local.delay) - expected
    row = min((r for r, own in of_mix if own.fragments == count), key=lambda r: _far(r, local), default=None)
    row = row or of_mix[0][0]
    apart = _apart(run, row, what="fragments and delay")
    return Added(
        expected=expected,
        open=math.hypot(row.spread or seeds, lent, others, expected if apart else 0.0),
        sources=tuple(str(r) for r, own in of_mix if own.fragments in (1, count)),
        extrapolated=(*noted, *apart),
    )


def _streaming_of(row: Beside) -> LocalSteps | None:
    """How a row streams; None where it is one of other options."""
    _, given = parse_recipe(row.recipe)
    return local_of(row.recipe) if set(given) & set(STREAMING) and not set(given) & set(MEANS) else None


def _over_delay(found: Sequence[tuple[Beside, LocalSteps]], fragments: int) -> Curve:
    """The cost of so many fragments over the delay, in steps; one fragment without a delay costs nothing."""
    none = [(0.0, 0.0)] if fragments == 1 else []
    return Curve(
        points=sorted(
            none + [(float(own.delay), row.cost) for row, own in found if own.fragments == fragments]
        )
    )


def _far(row: Beside, local: LocalSteps) -> int:
    own = local_of(row.recipe)
    assert own is not None
    return abs(own.delay - local.delay)


def _apart(run: Run, row: Beside, *, what: str) -> tuple[str, ...]:
    """In what a run differs from a row, in words."""
    own, theirs = local_of(run.recipe), local_of(row.recipe)
    pairs = [
        ("", run.name, parse_recipe(row.recipe)[0]),
        ("H = ", own and interval_of(own), theirs and interval_of(theirs)),
        ("replicas: ", run.replicas, row.replicas),
        ("steps: ", f"{run.steps:,}", f"{row.steps:,}"),
        ("parameters: ", f"{run.num_parameters:,}", f"{row.num_parameters:,}"),
    ]
    differ = [f"{label}{ours} ({measured} measured)" for label, ours, measured in pairs if ours != measured]
    return (f"{what}: {', '.join(differ)}",) if differ else ()
