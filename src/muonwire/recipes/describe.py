"""The meanings of a recipe's options, read from the docstrings of its settings classes: for help texts and docs/recipes.md."""

import inspect
import re
from dataclasses import MISSING, Field, fields
from typing import Any

# An entry of a docstring's Args: names, and a meaning that goes on in deeper lines.
_ENTRY = re.compile(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", re.MULTILINE)
# The meaning of an option that its author has written nothing of.
UNDESCRIBED = "(not described)"


def default_of(option: "Field[Any]") -> Any:
    """An option's default; MISSING where there is none."""
    return option.default_factory() if option.default_factory is not MISSING else option.default


def settings_of(options: type) -> list[type]:
    """The settings classes that hold a recipe's options, its own first."""
    return [c for c in options.__mro__ if c is not object and inspect.get_annotations(c)]


def meanings(options: type) -> dict[str, str]:
    """Every option's meaning; its default is left out where the text gives it only as the value.

    One that no class describes is UNDESCRIBED.
    Where a class changes only the default of an option, the meaning is that of the class that it inherits the option from.
    """
    found: dict[str, str] = {}
    for option in fields(options):
        holders = [c for c in settings_of(options) if option.name in inspect.get_annotations(c)]
        described = [(c, text) for c in holders if (text := _entries(c).get(option.name)) is not None]
        settings, text = described[0] if described else (holders[0], UNDESCRIBED)
        if settings is not holders[0]:
            # This default is another class's.
            text = re.sub(r"\s*Default: .*", "", text)
        found[option.name] = re.sub(r"\s*Default: \S+\.$", "", text)
    return found


def _entries(settings: type) -> dict[str, str]:
    """The options in a class's own docstring, each with its text in one line."""
    return {
        name: re.sub(r"\s+", " ", text).strip()
        for names, text in _ENTRY.findall(inspect.cleandoc(settings.__doc__ or ""))
        for name in names.split(", ")
    }


def docstring(opening: str, *, summary: str, options: type, source: str) -> str:
    """A recipe's docstring: what it is, its chain, every option, errors and source."""
    texts = meanings(options)
    lines = [inspect.cleandoc(opening), "", f"Chain: {summary}", "", "Args:"]
    lines.append("    model: its trainable parameters, the same on every replica.")
    for option in fields(options):
        text, default = texts[option.name], default_of(option)
        if default is not MISSING and "Default:" not in text:
            text += f"{'' if text.endswith('.') else '.'} Default: {default!r}."
        lines.append(f"    {option.name}: {text}")
    lines += ["", "Raises:"]
    lines.append("    UsageError: an option that the recipe does not have, or a value that is not allowed.")
    return "\n".join([*lines, "", f"Source: {source}."])
