"""What an answer to a hypothesis is made of, and the words that all of them share."""

from collections.abc import Sequence
from dataclasses import dataclass

from muonwire.report.blocks import Cell, Table
from muonwire.report.results import RecipeResult, told_apart
from muonwire.report.units import digits_text, listing_text, loss_text

CONFIRMED, REFUTED, DEPENDS, UNDECIDED = "Confirmed", "Refuted", "It depends on the bytes", "Undecided"
MISSING = "Not answered"

# Entropy-coded payloads differ by a little from run to run: up to this factor more bits still count as equal.
EQUAL_BITS = 1.05


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a comparison says about one hypothesis.

    Args:
        name: as in the list of claims.
        claim: what the source expects.
        verdict: one of the five words above.
        text: the figures that the verdict follows from, or what is missing.
        table: the recipes that take part.
    """

    name: str
    claim: str
    verdict: str
    text: str
    table: Table | None = None


def beats(one: RecipeResult, other: RecipeResult) -> bool:
    """Whether ``one`` ends lower with no more bits, and the seeds do not contradict it."""
    assert one.loss is not None
    assert other.loss is not None
    return (
        one.loss < other.loss and one.bits <= EQUAL_BITS * other.bits and told_apart(one, other) is not False
    )


def missing_text(absent: Sequence[str], diverged: set[str]) -> str:
    """Which recipes are missing, and how to run them; those that diverged are said to have."""
    parts = []
    gone = [a for a in absent if a in diverged]
    left = [a for a in absent if a not in diverged]
    if gone:
        parts.append(f"{listing_text(gone)} diverged.")
    if left:
        recipes = " ".join(f'"{a}"' for a in left)
        parts.append(
            f"Missing here: {listing_text(left)}. Add {recipes} to --recipes of the command under Setting and run it again; "
            "finished runs are kept."
        )
    return " ".join(parts)


def without_momentum(recipe: RecipeResult) -> bool:
    """Whether its options turn momentum off."""
    return recipe.first.options.get("momentum") == 0


def loss(recipe: RecipeResult) -> float:
    """Mean final loss of a recipe that is ranked."""
    assert recipe.loss is not None
    return recipe.loss


def ended(recipe: RecipeResult) -> str:
    """A recipe with its loss and bits."""
    return f"{recipe.recipe} ({loss_text(loss(recipe))}, {digits_text(recipe.bits)} bit)"


def listed(recipes: Sequence[RecipeResult]) -> str:
    """Recipes with their losses and bits."""
    return listing_text([ended(r) for r in recipes])


def loss_cell(recipe: RecipeResult) -> Cell:
    """Mean final loss, and the seeds' range below it."""
    low, high = min(recipe.losses), max(recipe.losses)
    detail = f"{loss_text(low)} to {loss_text(high)}" if len(recipe.losses) > 1 else ""
    return Cell(text=loss_text(loss(recipe)), detail=detail)
