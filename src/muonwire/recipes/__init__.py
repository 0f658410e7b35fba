"""Recipes: functions that return a complete optimizer for a model, with typed options; and by name, for configuration.

>>> from torch import nn
>>> optimizer = one_bit_muon(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), lr=0.014, interval=20)
>>> optimizer.local.interval
20
"""
# A starred module gives what its __all__ names, and table.py the recipes that it imports.
# ruff: noqa: F403, F405

import pkgutil
import warnings
from typing import Any

from torch import nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes import table
from muonwire.recipes.base import *
from muonwire.recipes.choose import *
from muonwire.recipes.define import *
from muonwire.recipes.table import *
from muonwire.transport.base import Transport

# Each recipe by its name: those of recipes/table.py, and what a program adds.
RECIPES: dict[str, Recipe] = {
    name: recipe_of(function) for name, function in vars(table).items() if not name.startswith("_")
}


def find(name: str) -> Recipe:
    """The recipe of that name.

    Args:
        name: a key of RECIPES, or a recipe of your own with its module, such as "my_recipes.sign_sgd".

    Raises:
        UsageError: there is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    if "." not in name:
        raise UsageError(f"recipe: {name!r} is unknown; allowed are {', '.join(RECIPES)}")
    try:
        return recipe_of(pkgutil.resolve_name(name))
    except (ImportError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"recipe: {name!r} cannot be imported ({error}); give module.function, from a folder that PYTHONPATH holds, of a "
            "function that ``recipe`` decorates"
        ) from error


def build(
    name: str, model: nn.Module, *, lr: float, transport: Transport | None = None, **options: Any
) -> ChainOptimizer:
    """The optimizer that recipe ``name`` makes for ``model``: for configuration, where the name is a text.

    Code that knows its recipe calls it: ``recipes.muon(model, lr=0.01)``, whose options type checkers and editors know.

    Args:
        name: one of ``RECIPES``.
        model: its trainable parameters, the same on every replica.
        lr: learning rate, at least 0.
        transport: the way to the other replicas. Default: one replica.
        **options: the recipe's own; see its function.

    Raises:
        UsageError: an unknown recipe or option, or a value that is not allowed.

    >>> optimizer = build("adamw", nn.Linear(2, 2), lr=0.001)
    >>> type(optimizer).__name__
    'ChainOptimizer'
    """
    recipe = find(name)
    if "exchange" in options:
        warnings.warn("recipes.build: exchange is now called transport", DeprecationWarning, stacklevel=2)
        transport = options.pop("exchange")
    return recipe.optimizer(model, {**options, "lr": lr, "transport": transport})
