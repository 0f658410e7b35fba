"""`muonwire recipes`."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields

from muonwire.cli.arguments import parse
from muonwire.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class RecipesCommand:
    """Arguments of `muonwire recipes`: none."""


def reference() -> str:
    """The recipes with their summaries and options, as text."""
    lines = []
    for recipe in RECIPES.values():
        lines.append(f"{recipe.name}: {recipe.summary}")
        for option in fields(recipe.options):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            lines.append(f"    {option.name}={default!r}")
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
