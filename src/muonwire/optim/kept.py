"""What an optimizer keeps of its weights besides the parameters themselves, and how it notices that others have changed them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.stages.base import State

# Names in a parameter's state: the float32 copy of a 16-bit weight, the weight that all replicas agree on, and samples of what the
# parameter held when the optimizer left it.
MASTER, SHARED, HELD = "master", "shared", "held"
SAMPLES = 256
States = Mapping[Tensor, State]


def wide_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's states and updates: its own, and float32 at least."""
    return torch.promote_types(param.dtype, torch.float32)


def copy_out(params: Sequence[Tensor], states: States, key: str) -> None:
    """Parameters become what is kept of them under ``key``, where it is."""
    for param in params:
        if key in states[param]:
            param.copy_(states[param][key])


def follow(params: Sequence[Tensor], states: States) -> None:
    """What is kept of the weights becomes what the parameters hold."""
    for param in params:
        for key in (MASTER, SHARED):
            if key in states[param]:
                states[param][key].copy_(param)


def unsent(state: State, path: Sequence[str]) -> Tensor:
    """What a replica has not sent yet of a parameter, where its state keeps it.

    Raises:
        UsageError: the state has no such tensor.
    """
    found: Any = state
    for name in path:
        if not isinstance(found, dict) or name not in found:
            raise UsageError(
                f"ChainOptimizer: a parameter's state has no {'.'.join(path)}; look_ahead names the exchange whose residual is "
                "looked ahead by, with its place in the chain"
            )
        found = found[name]
    residual: Tensor = found
    return residual


@contextmanager
def holding_shared(params: Sequence[Tensor], states: States) -> Iterator[None]:
    """Within the block the parameters hold the weights that all replicas share."""
    departed = [p for p in params if SHARED in states[p]]
    own = [p.detach().clone() for p in departed]
    with torch.no_grad():
        copy_out(departed, states, SHARED)
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(departed, own, strict=True):
                param.copy_(value)


def sample(weight: Tensor) -> Tensor:
    """Some 256 entries of a weight at equal distances, or all of a small one."""
    flat = weight.detach().reshape(-1)
    # An odd distance, so that the entries of a matrix lie in all its columns.
    return flat[:: flat.numel() // SAMPLES | 1] if flat.numel() > SAMPLES else flat


class LeftWeights:
    """Notices weights that somebody else has changed since the optimizer's last step.

    Where the optimizer keeps copies of weights, it leaves samples of them in the states, under "held", so that loaded states know
    what the weights were; edits that no sample shows are taken as the replica's own training. Elsewhere autograd's version counters
    and addresses tell, which cost nothing and miss edits through ``.data``.
    """

    def __init__(self) -> None:
        self._marks: list[Any] | None = None

    def leave(self, params: Sequence[Tensor], states: States) -> None:
        """The optimizer has written these."""
        self._marks = [_mark(p) for p in params]
        for param, piece in _sampled(_copied(params, states)):
            states[param][HELD] = piece

    def forget(self) -> None:
        """The states were loaded: where no samples tell, nothing is known of the weights."""
        self._marks = None

    def converted(self, params: Sequence[Tensor]) -> bool:
        """Whether any weight has another dtype or is on another device than it was left with, or nothing is known."""
        return self._marks is None or [mark[2:] for mark in self._marks] != [
            (p.dtype, p.device) for p in params
        ]

    def edited(self, params: Sequence[Tensor], states: States) -> bool:
        """Whether any weight holds other values than it was left with; a cast is no edit."""
        copied = _copied(params, states)
        if not copied:
            return self._marks is not None and [_mark(p) for p in params] != self._marks
        for param, piece in _sampled(copied):
            held = states[param].get(HELD)
            # In the weight's own dtype: one that was cast since holds what its cast samples hold.
            if held is None or not torch.equal(piece, held.to(piece.device, param.dtype).to(piece.dtype)):
                return True
        return False


def _mark(param: Tensor) -> tuple[int, int, torch.dtype, torch.device]:
    return param._version, param.data_ptr(), param.dtype, param.device


def _copied(params: Sequence[Tensor], states: States) -> list[Tensor]:
    """Those of which copies are kept."""
    return [p for p in params if MASTER in states[p] or SHARED in states[p]]


def _sampled(params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each with its samples, which are pieces of one tensor a device and dtype: a few large operations in place of many small."""
    by_kind: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for param in params:
        by_kind[param.device, wide_dtype(param)].append(param)
    for (_, dtype), alike in by_kind.items():
        pieces = [sample(p) for p in alike]
        joined = torch.cat(pieces).to(dtype)
        yield from zip(alike, torch.split(joined, [len(p) for p in pieces]), strict=True)
