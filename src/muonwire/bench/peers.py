"""Other packages' functions for the same task, as far as they are installed; used by the bench alone."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Factor = Callable[[Tensor], Tensor]
JORDAN_STEP = (3.4445, -4.775, 2.0315)
PYTORCH_OPTIMIZER = "pytorch_optimizer.optimizer.utils.matrix"


def _function(module: str, name: str, **options: object) -> Callable[[], Factor]:
    return lambda: partial(getattr(importlib.import_module(module), name), **options)


def _heavyball() -> Factor:
    utils = importlib.import_module("heavyball.utils")
    # Its functions compile themselves on the first call unless this is None.
    utils.compile_mode = None  # type: ignore[attr-defined]
    function: Factor = utils.zeropower_via_newtonschulz5
    return function


def _gram_newton_schulz() -> Factor:
    module = importlib.import_module("gram_newton_schulz")
    made: Factor = module.GramNewtonSchulz(ns_use_kernels=False, compile_kwargs=None)
    return made


# name -> builder, which raises where the package is missing. Packages on PyPI: muon-optimizer, timm, heavyball,
# pytorch_optimizer, gram-newton-schulz.
BUILDERS: dict[str, Callable[[], Factor]] = {
    "muon-optimizer": _function("muon", "zeropower_via_newtonschulz5", steps=5),
    "timm": _function("timm.optim.muon", "zeropower_via_newtonschulz", steps=5, coefficients=[JORDAN_STEP]),
    "heavyball": _heavyball,
    "pytorch_optimizer": _function(PYTORCH_OPTIMIZER, "zero_power_via_newton_schulz_5"),
    "pytorch_optimizer gram": _function(
        PYTORCH_OPTIMIZER, "zero_power_via_gram_newton_schulz", dtype=torch.bfloat16
    ),
    "gram-newton-schulz": _gram_newton_schulz,
}


def peers() -> dict[str, Factor]:
    """The installed peers that work here, by name: each is tried on one small matrix.

    >>> set(peers()) <= set(BUILDERS)
    True
    """
    found = {}
    for name, build in BUILDERS.items():
        try:
            function = build()
            shape = function(torch.eye(8, 16)).shape
        # A peer may fail in any way of its own: no package, another version, no compiler for its kernels.
        except Exception:
            continue
        if shape == (8, 16):
            found[name] = function
    return found
