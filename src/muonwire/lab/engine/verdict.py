"""From what checks say to a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from muonwire.lab.engine.check import FAILS, HOLDS, OPEN, Outcome

CONFIRMED, REFUTED, DEPENDS, UNDECIDED = "confirmed", "refuted", "depends", "undecided"
VERDICTS = (CONFIRMED, REFUTED, DEPENDS, UNDECIDED)

# More settings than these are not named in a sentence.
MOST_NAMED = 3

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
    def summary(self) -> str:
        """How many statements hold, fail or are open, and where they do."""
        where = {
            s: list(dict.fromkeys(o.check.setting for o in self.outcomes if o.state == s))
            for s in (HOLDS, FAILS, OPEN)
        }
        counts = {s: sum(o.state == s for o in self.outcomes) for s in where}
        words = {HOLDS: ("holds", "hold"), FAILS: ("fails", "fail"), OPEN: ("is open", "are open")}
        parts = []
        for state, settings in where.items():
            if settings:
                told = f"{counts[state]} {'statement' if counts[state] == 1 else 'statements'} {words[state][counts[state] > 1]}"
                # Many settings are a table's matter, which stands below.
                parts.append(f"{told} {_listing(settings)}" if len(settings) <= MOST_NAMED else told)
        return "; ".join(parts)


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
