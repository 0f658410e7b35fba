"""Short names of recipes, for charts: the name, and the options in which those of one name differ."""

from collections.abc import Mapping, Sequence
from typing import Any

from muonwire.compare.report.results import RecipeResult

# Options that have a letter in the literature.
_LETTERS = {"interval": "H", "period": "P"}
_LONGEST = 30


def short_names(recipes: Sequence[RecipeResult]) -> dict[str, str]:
    """By recipe, its name without the options that all recipes of that name share; no two alike, none longer than 30 characters.

    ``local_muon(interval=10, density=0.02)`` becomes ``local_muon`` where it is the only recipe of that name, and
    ``local_muon H=10 density=0.02`` beside one with another interval and density.
    """
    shorts: dict[str, str] = {}
    for recipe in recipes:
        same = [r.first.options for r in recipes if r.name == recipe.name]
        differing = {
            key: value
            for key, value in recipe.first.options.items()
            if any(key not in options or options[key] != value for options in same)
        }
        short = _cut(" ".join([recipe.name, *(_option(key, differing) for key in differing)]))
        number, base = 2, short
        while short in shorts.values():
            short = f"{base[: _LONGEST - 3]} {number}"
            number += 1
        shorts[recipe.recipe] = short
    return shorts


def _option(key: str, options: Mapping[str, Any]) -> str:
    value = options[key]
    text = ",".join(str(v) for v in value) if isinstance(value, list | tuple) else str(value)
    return f"{_LETTERS.get(key, key)}={text}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1].rstrip(" (=,|") + "…"
