"""`muonwire recipes`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from muonwire.cli.arguments import parse
from muonwire.recipes import RECIPES
from muonwire.recipes.describe import default_of


@dataclass(frozen=True, kw_only=True)
class RecipesCommand:
    """Arguments of `muonwire recipes`: none."""


def reference() -> str:
    """The recipes with their summaries and options, as text."""
    lines = []
    for recipe in RECIPES.values():
        lines.append(f"{recipe.name}: {recipe.summary}")
        # Their own arguments say the rate and the way to the other replicas.
        options = [option for option in fields(recipe.options) if option.name not in ("lr", "transport")]
        lines += [f"    {option.name}={default_of(option)!r}" for option in options]
    return "\n".join(lines)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parse(
        RecipesCommand,
        args,
        command="recipes",
        about="List the recipes, what each is made of, and its options with their defaults.",
        examples=("muonwire recipes",),
    )
    print(reference())
    return 0
