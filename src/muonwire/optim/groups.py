"""Parameter groups: what a group may hold, its defaults, and its checks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim.kept import FRAGMENT, HELD, MASTER, SHARED
from muonwire.stages.base import Stage
from muonwire.stages.chain import Chain, chain
from muonwire.stages.layout import MatrixLayout

# Further names in a parameter's state: the outer chain's states, and the state of a wrapped optimizer.
OUTER, AROUND = "outer", "around"
RESERVED = (MASTER, SHARED, HELD, OUTER, AROUND, FRAGMENT)
# Numbers that all groups of an optimizer hold alike.
COUNTERS = ("step", "synchronized_step", "synchronizations", "skipped_steps")


def completed(group: Mapping[str, Any], *, index: int, first: Mapping[str, Any]) -> dict[str, Any]:
    """The group with its parameters as a list, and with default names, layouts and counters."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    result = {"name": f"group {index}", **group}
    if params and isinstance(params[0], tuple):
        # Named parameters, as torch.optim takes them.
        result.setdefault("names", [name for name, _ in params])
        params = [param for _, param in params]
    result.setdefault("layouts", ["matrix"] * len(params))
    result.setdefault("names", [f"{result['name']}[{i}]" for i in range(len(params))])
    return {
        **result,
        "params": params,
        "param_shapes": [list(p.shape) for p in params],
        "processor": None,
        **{key: first.get(key, 0) for key in COUNTERS},
    }


def as_chain(stage: Any, *, index: int, what: str, remedy: str) -> Chain:
    """The chain that a group was given.

    Raises:
        UsageError: it is no stage, or has a member whose name the optimizer needs.
    """
    if not isinstance(stage, Stage):
        raise UsageError(f"ChainOptimizer: group {index} has {what} {stage!r}; give a Stage, {remedy}")
    members = stage if isinstance(stage, Chain) else chain(stage)
    reserved = [name for name, _ in members.members if name in RESERVED]
    if reserved and what == "chain":
        raise UsageError(
            f"ChainOptimizer: group {index} has a chain member named {reserved[0]!r}; the optimizer itself uses "
            f"{', '.join(RESERVED)}"
        )
    return members


def outer_chains(given: Any, *, index: int, count: int) -> list[Chain]:
    """One outer chain a parameter, of one for all or a list of them.

    Raises:
        UsageError: there is none, or there are more or fewer than parameters.
    """
    stages = given if isinstance(given, list | tuple) else [given] * count
    if len(stages) != count:
        raise UsageError(
            f"ChainOptimizer: group {index} has {len(stages)} outer chains for {count} parameters; give one Stage, or one "
            "a parameter"
        )
    remedy = "to every group, since the replicas step alone and exchange through it"
    return [as_chain(stage, index=index, what="outer_chain", remedy=remedy) for stage in stages]


def check(group: Mapping[str, Any]) -> None:
    """Make sure that the optimizer can take the group.

    Raises:
        UsageError: a negative rate or decay, layouts or names that do not match the parameters, or parameters on the meta device.
    """
    name, params = group["name"], group["params"]
    for key in ("lr", "weight_decay"):
        value = group[key]
        if not isinstance(value, Tensor) and not value >= 0:
            raise UsageError(f"ChainOptimizer: {key} of {name} is {value}; it must not be negative")
    if not len(group["layouts"]) == len(group["names"]) == len(params):
        raise UsageError(
            f"ChainOptimizer: {name} has {len(params)} parameters, {len(group['layouts'])} layouts and "
            f"{len(group['names'])} names; give one of each a parameter"
        )
    for layout in group["layouts"]:
        MatrixLayout.parse(layout)
    for param, param_name in zip(params, group["names"], strict=True):
        if param.is_meta:
            raise UsageError(
                f"ChainOptimizer: {param_name} is on the meta device, where it has no values; give the model memory "
                "(model.to_empty(device=...)) and its weights before building the optimizer"
            )


def description(param_groups: Sequence[Mapping[str, Any]]) -> str:
    """What must be the same on all replicas."""
    return "; ".join(
        f"{g['name']} {g['chain']} {g.get('outer_chains', '')} {g['param_shapes']} {g['layouts']} "
        f"{[str(p.dtype) for p in g['params']]}"
        for g in param_groups
    )


def rates(param_groups: Sequence[Mapping[str, Any]]) -> str:
    """What must be the same on all replicas in a step that they take together."""
    return "; ".join(
        f"{g['name']}: lr={float(g['lr'])!r}, weight_decay={float(g['weight_decay'])!r}" for g in param_groups
    )
