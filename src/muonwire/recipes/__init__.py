"""Recipes: named functions that return a complete optimizer for a model."""

import warnings
from typing import Any

from torch import nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.approaches import (
    APPROACH_A,
    APPROACH_B,
    APPROACH_C,
    APPROACH_D,
    APPROACH_F,
    DISTRO_WEIGHT_POLAR,
    PRE_POLAR,
)
from muonwire.recipes.base import Recipe, format_recipe, parse_recipe
from muonwire.recipes.choose import choose_dense
from muonwire.recipes.dense import ADAMW, MUON, NORMUON, SGD, MuonSettings
from muonwire.recipes.distro import DEMO, DISTRO, PSYCHE
from muonwire.recipes.feedback_muon import EF14_MUON, EF21_MUON, SIGNMUON
from muonwire.recipes.gda2 import GDA2
from muonwire.recipes.local import LOCAL_ADAMW, LOCAL_MUON
from muonwire.recipes.local_presets import DILOCO, MULOCO, SPARSELOCO
from muonwire.recipes.low_rank import APPROACH_E, DION, POWERSGD_MUON
from muonwire.recipes.muonfast import MUONFAST
from muonwire.recipes.one_bit import ONE_BIT_MUON
from muonwire.recipes.weight_polar import SGD_WEIGHT_POLAR
from muonwire.transport.base import Transport

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        ADAMW,
        MUON,
        DISTRO,
        ONE_BIT_MUON,
        LOCAL_MUON,
        LOCAL_ADAMW,
        DEMO,
        PSYCHE,
        MULOCO,
        DILOCO,
        SPARSELOCO,
        SGD,
        NORMUON,
        APPROACH_A,
        APPROACH_B,
        APPROACH_C,
        APPROACH_D,
        APPROACH_E,
        POWERSGD_MUON,
        APPROACH_F,
        PRE_POLAR,
        DISTRO_WEIGHT_POLAR,
        SGD_WEIGHT_POLAR,
        DION,
        EF14_MUON,
        EF21_MUON,
        SIGNMUON,
        MUONFAST,
        GDA2,
    )
}

__all__ = [
    "RECIPES",
    "MuonSettings",
    "Recipe",
    "build",
    "choose_dense",
    "find",
    "format_recipe",
    "parse_recipe",
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
    """The optimizer that recipe ``name`` makes for ``model``.

    Args:
        name: one of ``RECIPES``.
        model: its trainable parameters, the same on every replica.
        lr: learning rate, at least 0.
        transport: the way to the other replicas. Default: one replica.
        **options: the recipe's own; see its settings class.

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
    return recipe.build(model, recipe.make_options(options, lr=lr, transport=transport))
