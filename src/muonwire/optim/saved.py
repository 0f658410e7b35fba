"""Loading: saved states are matched with parameters by name and shape, and get their dtype and device."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim.adapting import INTERVALS
from muonwire.optim.fragments import FRAGMENTS
from muonwire.optim.groups import AROUND
from muonwire.optim.kept import FRAGMENT, HELD, MASTER, wide_dtype
from muonwire.optim.passes import copied
from muonwire.stages.base import State
from muonwire.transport.shards import is_sharded, shared_out

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer

# Prefixes that wrappers put into parameter names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.")
# Keys of a group that are there, or have other entries, where H changes in the run.
ADAPTING = (INTERVALS, FRAGMENTS)
# Keys of a group that identify it; the others are settings, which a state dict replaces.
STRUCTURE = ("name", "chain", "outer_chains", "layouts", "names", "param_shapes")


def load(
    optimizer: "ChainOptimizer", load_by_torch: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]
) -> None:
    """Load a state dict through torch's own method and its hooks, with each state matched to its parameter and dtype."""
    fresh: dict[Tensor, State] = {}

    def translate(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        """Match the state; runs after the hooks that users have registered, on what they returned."""
        in_order = matched(loaded, optimizer.param_groups)
        for mine, theirs in zip(optimizer.param_groups, in_order["param_groups"], strict=True):
            for param, name, key in zip(mine["params"], mine["names"], theirs["params"], strict=True):
                own = optimizer.state.get(param, {})
                fresh[param] = adopted(in_order["state"].get(key, {}), own, param, name=name)
        return in_order

    def adopt(_: torch.optim.Optimizer) -> None:
        """Put in the states before torch's cast, which rounds states wider than the parameters; runs before users' hooks."""
        optimizer.state.update(fresh)
        if optimizer.streaming is not None:
            optimizer.streaming.forget()
        if optimizer.adapting is not None:
            optimizer.adapting.forget()
        if optimizer.around is not None:
            optimizer.param_groups = load_wrapped(optimizer.around, optimizer.param_groups, optimizer.state)
        optimizer.agreement.reached = False
        optimizer.changes.forget()

    handles = [
        optimizer.register_load_state_dict_pre_hook(translate),
        optimizer.register_load_state_dict_post_hook(adopt, prepend=True),
    ]
    try:
        load_by_torch(state_dict)
    finally:
        for handle in handles:
            handle.remove()


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of DDP, FSDP and torch.compile.

    >>> plain_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return _WRAPPERS.sub("", name)


def matched(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A copy of the saved state dict in the order of ``groups``, the optimizer's own.

    Raises:
        UsageError: the state belongs to other parameters, shapes or chains, or is no state of an optimizer.
    """
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        keys = list(saved)[:6] if isinstance(saved, Mapping) else type(saved).__name__
        raise UsageError(
            f"load_state_dict: got {keys}; an optimizer's state dict has the keys state and param_groups"
        )
    if len(saved["param_groups"]) != len(groups):
        raise UsageError(
            f"load_state_dict: the saved state has {len(saved['param_groups'])} parameter groups, this optimizer {len(groups)}: "
            f"{', '.join(str(g['name']) for g in groups)}; build it with the recipe and model it was saved with"
        )
    result = []
    for mine, theirs in zip(groups, saved["param_groups"], strict=True):
        for what in ("chain", "outer_chains"):
            saved_text, own_text = (_chain_text(group.get(what)) for group in (theirs, mine))
            if saved_text != own_text:
                raise UsageError(
                    f"load_state_dict: the saved state of {theirs.get('name')!r} belongs to the chain {saved_text!r}, this "
                    f"optimizer has {own_text!r}; build it with the recipe and options it was saved with"
                )
        saved_count, own_count = (_num_fragments(group) for group in (theirs, mine))
        if saved_count != own_count:
            raise UsageError(
                f"load_state_dict: the saved state of {theirs.get('name')!r} has {saved_count} fragment(s), this optimizer "
                f"{own_count}; build it with the options it was saved with"
            )
        order = _order(mine, theirs)
        result.append(
            {
                **{k: v for k, v in theirs.items() if k not in (*STRUCTURE, *ADAPTING)},
                **{k: mine[k] for k in STRUCTURE if k in mine},
                **_adapted(mine, theirs),
                "params": [theirs["params"][i] for i in order],
            }
        )
    return {**saved, "param_groups": result}


def _order(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[int]:
    """For each parameter of my group, its index in theirs."""
    names = [plain_name(n) for n in mine["names"]]
    count = len(theirs["params"])
    # torch.distributed.checkpoint puts names in the place of numbers, already in this optimizer's order.
    renamed = all(isinstance(p, str) for p in theirs["params"])
    saved_names = theirs["params"] if renamed else theirs.get("names")
    if saved_names is None or len(saved_names) != count:
        raise UsageError(f"load_state_dict: the saved state of {mine['name']!r} does not name its parameters")
    saved_names = [plain_name(n) for n in saved_names]
    if len(names) != count:
        raise UsageError(
            f"load_state_dict: the saved state of {mine['name']!r} has {count} parameters, this optimizer's group {len(names)}; "
            f"{_first_difference(names, saved_names)}"
        )
    if renamed or _are_numbered(names) or _are_numbered(saved_names):
        order = list(range(count))
    elif sorted(names) == sorted(saved_names):
        order = [saved_names.index(name) for name in names]
    else:
        raise UsageError(
            f"load_state_dict: the saved state of {mine['name']!r} belongs to other parameters: "
            f"{_first_difference(names, saved_names)}"
        )
    shapes = None if renamed else theirs.get("param_shapes")
    for i, j in enumerate(order):
        if shapes is not None and list(mine["param_shapes"][i]) != list(shapes[j]):
            raise UsageError(
                f"load_state_dict: {names[i]} has shape {tuple(mine['param_shapes'][i])}, its saved state that of a parameter of "
                f"shape {tuple(shapes[j])}; build the model with the sizes it was saved with"
            )
    return order


def _chain_text(value: Any) -> Any:
    """A group's chain, or its parameters' outer chains, each once."""
    return " and ".join(sorted(set(value))) if isinstance(value, list | tuple) else value


def _adapted(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What goes on with the state where H changes in the run; my own beginning where the state was saved with a fixed one."""
    found = {key: {**mine[key], **theirs.get(key, {})} for key in ADAPTING if key in mine}
    if FRAGMENTS in mine:
        # A fixed interval has no gaps.
        found[FRAGMENTS] = {key: found[FRAGMENTS][key] for key in mine[FRAGMENTS]}
    return found


def _num_fragments(group: Mapping[str, Any]) -> int:
    return len(group["fragments"]["sent"]) if "fragments" in group else 1


def _are_numbered(names: Sequence[str]) -> bool:
    """Whether these are the default names of parameters without names of their own."""
    return all(re.fullmatch(r".*\[\d+\]", name) for name in names)


def _first_difference(names: Sequence[str], saved_names: Sequence[str]) -> str:
    missing = [n for n in names if n not in saved_names]
    other = [n for n in saved_names if n not in names]
    return "; ".join(
        [f"{missing[0]} is not in it"] * bool(missing)
        + [f"it has {other[0]}, which is not here"] * bool(other)
    )


def restored(
    saved: State, own: State, weight: Tensor, *, name: str, path: str = "", leave_out: str = ""
) -> State:
    """A copy of a saved state in the dtypes of ``own``, the fresh one, and on the weight's device; ``leave_out`` stays as it is.

    Raises:
        UsageError: a tensor of the saved state has another shape.
    """
    result: State = {}
    for key, value in saved.items():
        here = f"{path}.{key}".lstrip(".")
        mine = own.get(key)
        if isinstance(value, dict) and key != leave_out:
            result[key] = restored(
                value, mine if isinstance(mine, dict) else {}, weight, name=name, path=here
            )
        elif isinstance(value, Tensor):
            # What can be in flight is empty where it is not.
            in_flight = path == FRAGMENT and 0 in (value.numel(), value.numel() - weight.numel())
            if isinstance(mine, Tensor) and mine.shape != value.shape and not in_flight:
                raise UsageError(
                    f"load_state_dict: {here} of {name} has shape {tuple(value.shape)}, {tuple(mine.shape)} is wanted; the state "
                    "belongs to another parameter or other options"
                )
            result[key] = in_dtype(value, weight, like=mine)
        else:
            result[key] = value
    # A state that was flattened to be saved has lost its empty parts.
    for key, mine in own.items():
        if isinstance(mine, dict) and key not in saved and next(_leaves(mine), None) is None:
            result[key] = copied(mine)
    return result


def _leaves(state: State) -> Iterator[Any]:
    for value in state.values():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield value


def in_dtype(value: Tensor, weight: Tensor, *, like: Any = None) -> Tensor:
    """A copy on the weight's device and sharded like it, floating values in the dtype of ``like``, else at least in float32."""
    dtype, value = value.dtype, shared_out(value, weight)
    if isinstance(like, Tensor):
        dtype = like.dtype
    elif value.is_floating_point():
        dtype = wide_dtype(weight)
    return value.detach().to(weight.device, dtype, copy=True)


def adopted(saved: State, own: State, weight: Tensor, *, name: str) -> State:
    """A parameter's saved state in the form of ``own``, the optimizer's fresh state of it.

    Raises:
        UsageError: an entry of ``own`` is missing, has another shape, or there are others.
    """
    own = {key: value for key, value in own.items() if key != AROUND}
    state = restored(saved, own, weight, name=name, leave_out=AROUND)
    missing = [key for key in own if key not in state and key not in (MASTER, HELD)]
    if missing:
        raise UsageError(
            f"load_state_dict: the saved state of {name} has no {missing[0]}; it has {', '.join(state) or 'nothing'}. It was saved "
            "by another kind of optimizer, or by one with other options"
        )
    unknown = [key for key in state if key not in own and key not in (MASTER, HELD, AROUND)]
    if unknown:
        raise UsageError(
            f"load_state_dict: the saved state of {name} has {unknown[0]}, which this optimizer does not keep; it was saved by "
            "another kind of optimizer, or by one with other options"
        )
    convert(state, weight, keeps_master=MASTER in own)
    if is_sharded(weight):
        # Samples of whole weights, or of other shards.
        state.pop(HELD, None)
    return state


def load_wrapped(
    around: torch.optim.Optimizer, groups: Sequence[dict[str, Any]], states: Mapping[Tensor, State]
) -> list[dict[str, Any]]:
    """Load a wrapped optimizer's part of the states into it, and return its groups, which its wrapper shares."""
    numbers = {p: i for i, p in enumerate(p for group in groups for p in group["params"])}
    around.load_state_dict(
        {
            "state": {i: states[p][AROUND] for p, i in numbers.items() if states[p].get(AROUND)},
            "param_groups": [{**g, "params": [numbers[p] for p in g["params"]]} for g in groups],
        }
    )
    for param in numbers:
        states[param][AROUND] = around.state[param]
    return around.param_groups


def convert(state: State, param: Tensor, *, keeps_master: bool) -> None:
    """Move a state to its parameter's device and wide dtype; add the master of a 16-bit weight, drop that of a wide one."""
    _move({key: value for key, value in state.items() if key != AROUND}, state, param)
    if not keeps_master:
        state.pop(MASTER, None)
    elif MASTER not in state:
        state[MASTER] = param.detach().to(wide_dtype(param), copy=True)


def _move(entries: State, into: State, param: Tensor) -> None:
    for key, value in entries.items():
        if isinstance(value, dict):
            _move(value, value, param)
        elif isinstance(value, Tensor):
            dtype = wide_dtype(param) if value.is_floating_point() else value.dtype
            into[key] = value.to(param.device, dtype)
