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
        self._marks: list[_Mark] | None = None
        self._samples: list[_Samples] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy's weights lie elsewhere.
        return {"_marks": None, "_samples": []}

    def leave(self, params: Sequence[Tensor], states: States) -> None:
        """The optimizer has written these."""
        marks = [_mark(p) for p in params]
        if self._samples and self._in_place(marks):
            for samples in self._samples:
                samples.take()
        else:
            self._samples = [_Samples(alike, states) for alike in _by_kind(_copied(params, states))]
        self._marks = marks

    def forget(self) -> None:
        """The states were loaded: where no samples tell, nothing is known of the weights."""
        self._marks, self._samples = None, []

    def converted(self, params: Sequence[Tensor]) -> bool:
        """Whether any weight has another dtype or is on another device than it was left with, or nothing is known."""
        return self._marks is None or any(
            mark[2] is not p.dtype or mark[3] != p.device
            for mark, p in zip(self._marks, params, strict=False)
        )

    def edited(self, params: Sequence[Tensor], states: States) -> bool:
        """Whether any weight holds other values than it was left with; a cast is no edit."""
        marks = [_mark(p) for p in params]
        if self._samples and self._in_place(marks):
            return any(samples.differ() for samples in self._samples)
        copied = _copied(params, states)
        if not copied:
            return self._marks is not None and marks != self._marks
        for param in copied:
            held, now = states[param].get(HELD), sample(param)
            # In the weight's own dtype: one that was cast since holds what its cast samples hold.
            if held is None or not torch.equal(now, held.to(param.device, param.dtype)):
                return True
        return False

    def _in_place(self, marks: "Sequence[_Mark]") -> bool:
        """Whether the weights lie where they lay, in the same dtypes."""
        return self._marks is not None and [m[1:] for m in marks] == [m[1:] for m in self._marks]


class _Samples:
    """Samples of the weights of one device and dtype: views of what they hold now, and one tensor of what they held.

    One large operation in place of many small ones.
    """

    def __init__(self, params: Sequence[Tensor], states: States) -> None:
        self._params = params
        self._views = [sample(p) for p in params]
        self._left = torch.cat(self._views).to(wide_dtype(params[0]))
        pieces = torch.split(self._left, [len(v) for v in self._views])
        for param, piece in zip(params, pieces, strict=True):
            states[param][HELD] = piece

    def _now(self) -> Tensor:
        # The sample of a weight that is not contiguous is a copy.
        views = [
            v if p.is_contiguous() else sample(p) for v, p in zip(self._views, self._params, strict=True)
        ]
        return torch.cat(views).to(self._left.dtype)

    def differ(self) -> bool:
        """Whether the weights hold something else than was taken."""
        return not torch.equal(self._now(), self._left)

    def take(self) -> None:
        """What the weights hold now."""
        self._left.copy_(self._now())


_Mark = tuple[int, int, torch.dtype, torch.device]


def _mark(param: Tensor) -> _Mark:
    return param._version, param.data_ptr(), param.dtype, param.device


def _copied(params: Sequence[Tensor], states: States) -> list[Tensor]:
    """Those of which copies are kept."""
    return [p for p in params if MASTER in states[p] or SHARED in states[p]]


def _by_kind(params: Sequence[Tensor]) -> list[list[Tensor]]:
    by_kind: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for param in params:
        by_kind[param.device, param.dtype].append(param)
    return list(by_kind.values())
