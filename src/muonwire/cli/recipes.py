"""`muonwire recipes`."""

from dataclasses import dataclass, fields

from muonwire.cli.arguments import command
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
        # `muonwire train` has arguments of its own for the rate and the replicas.
        options = [option for option in fields(recipe.options) if option.name not in ("lr", "transport")]
        lines += [f"    {option.name}={default_of(option)!r}" for option in options]
    return "\n".join(lines)


@command(
    RecipesCommand,
    name="recipes",
    about="List the recipes, what each is made of, and its options with their defaults.",
    examples=("muonwire recipes",),
)
def main(_: RecipesCommand) -> int:
    """List the recipes; returns the exit code."""
    print(reference())
    return 0
