"""Recipes: functions that return a complete optimizer for a model, with typed options; and by name, for configuration.

>>> from torch import nn
>>> optimizer = one_bit_muon(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), lr=0.014, interval=20)
>>> optimizer.local.interval
20
"""

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.anderson import gda2
from muonwire.recipes.approaches import (
    approach_a,
    approach_b,
    approach_c,
    approach_d,
    approach_f,
    distro_weight_polar,
    pre_polar,
)
from muonwire.recipes.choose import choose_dense
from muonwire.recipes.define import Recipe, format_recipe, parse_recipe, recipe_of
from muonwire.recipes.demo_family import demo, distro, psyche
from muonwire.recipes.dense import RoutedSettings, adamw, muon, normuon, sgd
from muonwire.recipes.fast_variants import muonfast
from muonwire.recipes.feedback_muon import ef14_muon, ef21_muon, signmuon
from muonwire.recipes.local import local_adamw, local_muon
from muonwire.recipes.local_presets import diloco, muloco, sparseloco
from muonwire.recipes.low_rank import approach_e, dion, powersgd_muon
from muonwire.recipes.one_bit import one_bit_muon
from muonwire.recipes.weight_polar import sgd_weight_polar
from muonwire.transport.base import Transport

_FUNCTIONS: tuple[Callable[..., ChainOptimizer], ...] = (
    adamw,
    muon,
    distro,
    one_bit_muon,
    local_muon,
    local_adamw,
    demo,
    psyche,
    muloco,
    diloco,
    sparseloco,
    sgd,
    normuon,
    approach_a,
    approach_b,
    approach_c,
    approach_d,
    approach_e,
    powersgd_muon,
    approach_f,
    pre_polar,
    distro_weight_polar,
    sgd_weight_polar,
    dion,
    ef14_muon,
    ef21_muon,
    signmuon,
    muonfast,
    gda2,
)
RECIPES: dict[str, Recipe] = {r.name: r for r in map(recipe_of, _FUNCTIONS)}

__all__ = [
    "RECIPES",
    "Recipe",
    "RoutedSettings",
    "adamw",
    "approach_a",
    "approach_b",
    "approach_c",
    "approach_d",
    "approach_e",
    "approach_f",
    "build",
    "choose_dense",
    "demo",
    "diloco",
    "dion",
    "distro",
    "distro_weight_polar",
    "ef14_muon",
    "ef21_muon",
    "find",
    "format_recipe",
    "gda2",
    "local_adamw",
    "local_muon",
    "muloco",
    "muon",
    "muonfast",
    "normuon",
    "one_bit_muon",
    "parse_recipe",
    "powersgd_muon",
    "pre_polar",
    "psyche",
    "sgd",
    "sgd_weight_polar",
    "signmuon",
    "sparseloco",
]


def find(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in RECIPES:
        raise UsageError(f"recipe: {name!r} is unknown; allowed are {', '.join(RECIPES)}")
    return RECIPES[name]


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
