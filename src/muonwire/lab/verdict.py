"""From what checks say to a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muonwire.lab.check import FAILS, HOLDS, OPEN, Outcome

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
    def text(self) -> str:
        """The verdict in words, with the figures."""
        parts = [f"{o.check.setting}: {o.check.name} {o.state}, {o.figure}" for o in self.outcomes]
        if self.verdict == DEPENDS:
            where = {
                s: _listing([o.check.setting for o in self.outcomes if o.state == s]) for s in (HOLDS, FAILS)
            }
            head = f"depends: it holds {where[HOLDS]} and fails {where[FAILS]}"
        else:
            head = self.verdict
        return f"{head}. " + "; ".join(parts) + "."


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


def _listing(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(names))
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"
