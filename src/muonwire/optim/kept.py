"""Copies of weights that an optimizer keeps besides the parameters, and how it notices changes that others made to these."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.stages.base import State
from muonwire.transport.shards import local

# Names in a parameter's state: the float32 copy of a 16-bit weight, the weight that all replicas agree on, and samples of what the
# parameter held after the optimizer's last step.
MASTER, SHARED, HELD = "master", "shared", "held"
# Where fragments synchronize at different times: which one the parameter belongs to, and what of it is in flight.
FRAGMENT = "fragment"
SAMPLES = 256
StatesByParam = Mapping[Tensor, State]


def wide_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's states and updates: its own, and float32 at least."""
    return torch.promote_types(param.dtype, torch.float32)


def copy_out(params: Sequence[Tensor], states: StatesByParam, key: str) -> None:
    """Copy what is kept of the parameters under ``key``, where it is kept, into them."""
    for param in params:
        if key in states[param]:
            local(param).copy_(local(states[param][key]))


def copy_in(params: Sequence[Tensor], states: StatesByParam) -> None:
    """Copy the parameters into what is kept of them."""
    for param in params:
        for key in (MASTER, SHARED):
            if key in states[param]:
                local(states[param][key]).copy_(local(param))


def unsent(state: State, path: Sequence[str]) -> Tensor:
    """The part of a parameter's update that the replica has not sent yet, as its state keeps it.

    Raises:
        UsageError: the state has no such tensor.
    """
    found: Any = state
    for name in path:
        if not isinstance(found, dict) or name not in found:
            raise UsageError(
                f"ChainOptimizer: a parameter's state has no {'.'.join(path)}; look_ahead wants the path of the residual of an "
                "exchange, such as ('exchange', 'residual')"
            )
        found = found[name]
    residual: Tensor = local(found)
    return residual


@contextmanager
def holding_shared(
    params: Sequence[Tensor], states: StatesByParam, after_change: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Within the block the parameters hold the weights that all replicas share.

    Args:
        params: these.
        states: of the parameters.
        after_change: called whenever the parameters hold other values. Default: nothing.
    """
    departed = [p for p in params if SHARED in states[p]]
    own = [local(p).detach().clone() for p in departed]
    with torch.no_grad():
        copy_out(departed, states, SHARED)
    after_change()
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value in zip(departed, own, strict=True):
                local(param).copy_(value)
        after_change()


def sample(weight: Tensor) -> Tensor:
    """Some 256 entries of a weight at equal distances, or all of a small one."""
    flat = local(weight).detach().reshape(-1)
    # An odd distance, so that the entries of a matrix lie in all its columns.
    return flat[:: flat.numel() // SAMPLES | 1] if flat.numel() > SAMPLES else flat


class ChangeDetector:
    """Notices weights that somebody else has changed since the optimizer's last step.

    Where the optimizer keeps copies of weights, it also keeps samples of the weights in the states, under "held", so that a loaded
    state shows what the weights were; edits that no sample shows are taken as the replica's own training. Elsewhere it compares
    autograd's version counters and addresses, which costs nothing and misses edits through ``.data``. Where replicas are groups of
    processes, samples are not in the states, since they would not fit another number of processes: of a loaded state without
    samples, only masters show what the weights were.
    """

    def __init__(self) -> None:
        self._marks: list[_Mark] | None = None
        self._samples: list[_Samples] = []
        self._question: Question | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied or unpickled optimizer has weights at other addresses.
        return {"_marks": None, "_samples": [], "_question": None}

    def record(self, params: Sequence[Tensor], states: StatesByParam, *, in_states: bool = True) -> None:
        """Remember these weights, which the optimizer has just written.

        Args:
            params: these.
            states: of the parameters.
            in_states: whether the samples are kept there. Default: True.
        """
        marks = [_mark(p) for p in params]
        if self._samples and self._in_place(marks):
            for samples in self._samples:
                samples.record()
        else:
            self._samples = [_Samples(alike) for alike in _by_kind(_copied(params, states))]
            for samples in self._samples:
                samples.put(states if in_states else {})
            if not in_states:
                for param in params:
                    states[param].pop(HELD, None)
        self._marks = marks

    def forget(self) -> None:
        """Drop what is remembered, after states were loaded; only the loaded samples count from then on."""
        self._marks, self._samples = None, []

    def converted(self, params: Sequence[Tensor]) -> bool:
        """Whether any weight has another dtype or device than was recorded, or nothing was recorded."""
        return self._marks is None or any(
            mark[2] is not p.dtype or mark[3] != p.device
            for mark, p in zip(self._marks, params, strict=False)
        )

    def ask(self, params: Sequence[Tensor]) -> "Question | None":
        """What the next ``edited`` wants to know of these weights; whoever answers it saves the host a wait for the device."""
        asks = self._samples and self._in_place([_mark(p) for p in params])
        self._question = Question([samples.differing() for samples in self._samples]) if asks else None
        return self._question

    def edited(self, params: Sequence[Tensor], states: StatesByParam) -> bool:
        """Whether any weight holds other values than were recorded; a cast is no edit."""
        marks = [_mark(p) for p in params]
        question, self._question = self._question, None
        if self._samples and self._in_place(marks):
            if question is not None and question.answers is not None:
                return any(question.answers)
            return any(bool(samples.differing()) for samples in self._samples)
        copied = _copied(params, states)
        if not copied:
            return self._marks is not None and marks != self._marks
        for param in copied:
            held, now = states[param].get(HELD), sample(param)
            if held is None and MASTER in states[param]:
                held, now = local(states[param][MASTER]), local(param)
            # Compared in the weight's own dtype: a weight that was cast equals its cast samples.
            if held is not None and not torch.equal(now, held.to(param.device, param.dtype)):
                return True
        return False

    def _in_place(self, marks: "Sequence[_Mark]") -> bool:
        """Whether the weights have the recorded addresses, dtypes and devices."""
        return self._marks is not None and [m[1:] for m in marks] == [m[1:] for m in self._marks]


class Question:
    """What the host wants to know of weights: whether any value differs, of each of their devices and dtypes.

    Args:
        differ: a bool each, on the devices.
    """

    def __init__(self, differ: Sequence[Tensor]) -> None:
        self.differ = differ
        # Of each of them, once somebody has fetched it.
        self.answers: list[bool] | None = None


class _Samples:
    """Samples of the weights of one device and dtype: views of their values, and one tensor of the recorded values.

    Comparing them is one large operation in place of many small ones.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._views = [sample(p) for p in params]
        self._recorded = torch.cat(self._views).to(wide_dtype(params[0]))

    def put(self, states: StatesByParam) -> None:
        """Put views of what is recorded into the states that there are."""
        pieces = torch.split(self._recorded, [len(v) for v in self._views])
        for param, piece in zip(self._params, pieces, strict=True):
            if param in states:
                states[param][HELD] = piece

    def _now(self) -> Tensor:
        # The sample of a weight that is not contiguous is a copy.
        views = [
            v if local(p).is_contiguous() else sample(p)
            for v, p in zip(self._views, self._params, strict=True)
        ]
        return torch.cat(views).to(self._recorded.dtype)

    def differing(self) -> Tensor:
        """Whether the weights hold other values than were recorded: one bool on their device."""
        return (self._now() != self._recorded).any()

    def record(self) -> None:
        """Take the samples anew."""
        self._recorded.copy_(self._now())


_Mark = tuple[int, int, torch.dtype, torch.device]


def _mark(param: Tensor) -> _Mark:
    own = local(param)
    return own._version, own.data_ptr(), own.dtype, own.device


def _copied(params: Sequence[Tensor], states: StatesByParam) -> list[Tensor]:
    """The parameters of which copies are kept."""
    return [p for p in params if MASTER in states[p] or SHARED in states[p]]


def _by_kind(params: Sequence[Tensor]) -> list[list[Tensor]]:
    by_kind: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for param in params:
        by_kind[param.device, param.dtype].append(param)
    return list(by_kind.values())
