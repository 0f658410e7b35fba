"""From what checks say to a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muonwire.lab.engine.check import FAILS, HOLDS, OPEN, Outcome
from muonwire.pages.units import listing_text

CONFIRMED, REFUTED, DEPENDS, UNDECIDED = "confirmed", "refuted", "depends", "undecided"
VERDICTS = (CONFIRMED, REFUTED, DEPENDS, UNDECIDED)

Rule = Callable[[Sequence[Outcome]], str]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The verdict on a claim and what it follows from.

    Args:
        verdict: "confirmed", "refuted", "depends" or "undecided".
        outcomes: of the claim's checks, in their order.
    """

    verdict: str
    outcomes: tuple[Outcome, ...]

    @property
    def answer(self) -> str:
        """One sentence: what holds, what fails and what is open, each with its figure, in the order of the checks.

        Clauses that say the same of several places are joined. An undecided one says how many seeds would tell.
        """
        places: dict[str, list[str]] = {}
        for one in self.outcomes:
            if one.predicate:
                place = one.place_and_seeds if self.verdict == UNDECIDED else one.place
                places.setdefault(one.predicate, []).append(place)
        clauses = "; ".join(
            f"{said} {listing_text(list(dict.fromkeys(where)))}".rstrip() for said, where in places.items()
        )
        return f"{clauses[:1].upper()}{clauses[1:]}." if clauses else ""

    @property
    def counts(self) -> str:
        """How many statements hold, fail or are open."""
        found = [o.state for o in self.outcomes]
        return ", ".join(f"{found.count(s)} {s}" for s in (HOLDS, FAILS, OPEN) if s in found)


def unanimous(outcomes: Sequence[Outcome]) -> str:
    """Confirmed where every check holds, refuted where every one fails, "depends" where some hold and some fail.

    A check that is open leaves the verdict undecided, unless others already hold and fail.
    """
    states = {o.state for o in outcomes}
    if {HOLDS, FAILS} <= states:
        return DEPENDS
    if OPEN in states or not states:
        return UNDECIDED
    return CONFIRMED if states == {HOLDS} else REFUTED


def all_needed(outcomes: Sequence[Outcome]) -> str:
    """For a claim that is a conjunction: confirmed where every check holds, refuted where any fails, else undecided."""
    states = {o.state for o in outcomes}
    if FAILS in states:
        return REFUTED
    return CONFIRMED if states == {HOLDS} else UNDECIDED
