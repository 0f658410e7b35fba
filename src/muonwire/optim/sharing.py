"""What of an optimizer's state is the same on all replicas, and what is a replica's own.

A replica that has lost its state, or that is new, gets the shared part from another one and begins anew with the rest. Which is
which follows from the chains: ``Stage.returns_alike`` and ``Stage.shared_state``, ``Feedback.shared``.

| state | shared | a replica's own |
|---|---|---|
| of stages before a chain's first exchange: momentum, Adam | | all |
| of an exchange | EF21's ``mean_estimate``, ``sums`` | residual, EF21's ``estimate``, the codec's, what an owner keeps |
| of a low-rank exchange (power_sgd, dion) | ``start`` | ``kept`` |
| of delayed, predicted | ``waiting``, ``prediction``, the direction's | what the stage inside keeps as its own |
| of serve | | all: only the owner of a tensor moves it |
| of stages behind an exchange: momentum, Adam | all | |
| with local steps: the inner chain's, a wrapped optimizer's | | all, and the weights between synchronizations |
| with local steps: the outer chain's | as above, by its stages | as above |
| of a fragment: ``index``, ``arrived`` | all | |
| of a fragment: ``sent`` | | all |
| the shared weights; masters without local steps | all | |
| counters and settings of the groups | all | with local steps: skipped steps, the processor of the local steps |
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonwire.optim.fresh import fresh_state
from muonwire.optim.groups import AROUND, OUTER, RESERVED
from muonwire.optim.kept import FRAGMENT, MASTER, SHARED, copy_out
from muonwire.stages.base import State
from muonwire.stages.chain import Chain

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer


def shared_part(optimizer: "ChainOptimizer", state_dict: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The part of a state dict that is the same on all replicas, to the last bit, when all are in the same step.

    Args:
        optimizer: whose state it is; its chains decide.
        state_dict: of this optimizer, or of one with the same parameters and chains. Default: what it holds now.

    Returns:
        A state dict without the replica's own entries, for ``load_shared``. The weights are not in it, except where the
        optimizer keeps copies of them.
    """
    source = optimizer.state_dict() if state_dict is None else state_dict
    states: dict[Any, State] = {}
    for key, param, members in _matched(optimizer, source):
        if key in source["state"]:
            states[key] = _shared_state(optimizer, param, members, source["state"][key])
    own = {} if optimizer.local is None else {"skipped_steps": 0, "processor": None}
    return {"state": states, "param_groups": [{**group, **own} for group in source["param_groups"]]}


def own_entries(optimizer: "ChainOptimizer") -> list[str]:
    """The entries of the state that are a replica's own, such as "exchange.residual", each once.

    They are what a replica that has lost its state begins anew with; with local steps it also loses the steps that it took
    alone since the last synchronization.
    """
    found: dict[str, None] = {}
    for _, param, members in _matched(optimizer, optimizer.state_dict()):
        if param not in optimizer.state:
            continue
        state = optimizer.state[param]
        shared = set(_paths(_shared_state(optimizer, param, members, state)))
        for path in _paths({k: v for k, v in state.items() if k in (OUTER, AROUND) or k not in RESERVED}):
            if path not in shared:
                found[path] = None
    return list(found)


def completed(optimizer: "ChainOptimizer", shared: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state dict out of another replica's shared part, with fresh states where the replica's own are lost.

    Args:
        optimizer: that is to load it.
        shared: what ``shared_part`` gave on another replica.
    """
    states: dict[Any, State] = {}
    layouts = {
        param: layout
        for g in optimizer.param_groups
        for param, layout in zip(g["params"], g["layouts"], strict=True)
    }
    for key, param, members in _matched(optimizer, shared):
        if key not in shared["state"]:
            continue
        fresh = fresh_state(optimizer, param, members, layouts[param])
        if AROUND in fresh:
            fresh[AROUND] = {}
        states[key] = state = _merged(fresh, shared["state"][key])
        # A replica that has taken no step alone stands at the shared weights.
        if MASTER in state and SHARED in state:
            state[MASTER] = state[SHARED].detach().clone()
        if FRAGMENT in state and state[FRAGMENT]["arrived"].numel():
            # What it keeps of its own steps is counted from there.
            state[FRAGMENT]["sent"] = state[SHARED].detach().clone()
    return {"state": states, "param_groups": [dict(group) for group in shared["param_groups"]]}


@torch.no_grad()
def load_shared(optimizer: "ChainOptimizer", shared: Mapping[str, Any]) -> None:
    """Load another replica's shared part, and begin anew with this replica's own entries.

    The parameters must hold the shared weights already where the optimizer keeps no copies of them; where it does, they get those.

    Args:
        optimizer: of the replica that is new or has lost its state.
        shared: what ``shared_part`` gave on another replica in the same step.

    Raises:
        UsageError: the state belongs to other parameters, shapes, chains or another kind of optimizer; nothing has changed.
    """
    optimizer.load_state_dict(completed(optimizer, shared))
    params = optimizer.trained()
    for key in (MASTER, SHARED):
        copy_out(params, optimizer.state, key)
    optimizer.record_weights()


def _matched(
    optimizer: "ChainOptimizer", state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, Tensor, Chain]]:
    """The keys of a state dict's states, each with its parameter and the chain of its group."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], optimizer.chains, strict=True)
    for mine, theirs, members in groups:
        for param, key in zip(mine["params"], theirs["params"], strict=True):
            yield key, param, members


def _shared_state(optimizer: "ChainOptimizer", param: Tensor, members: Chain, state: State) -> State:
    kept = {SHARED: state[SHARED]} if SHARED in state else {}
    if optimizer.local is None:
        if MASTER in state:
            kept[MASTER] = state[MASTER]
        return kept | members.shared_state(state, alike=False)
    if FRAGMENT in state:
        kept[FRAGMENT] = {key: value for key, value in state[FRAGMENT].items() if key != "sent"}
    outer = optimizer.outer[param].shared_state(state.get(OUTER, {}), alike=False)
    return kept | ({OUTER: outer} if outer else {})


def _merged(fresh: State, shared: Mapping[str, Any]) -> State:
    """``shared``, and what of ``fresh`` it lacks."""
    result: State = {**fresh, **shared}
    for key, value in fresh.items():
        if isinstance(value, dict) and isinstance(shared.get(key), Mapping):
            result[key] = _merged(value, shared[key])
    return result


def _paths(state: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"
