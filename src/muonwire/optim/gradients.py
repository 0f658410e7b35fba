"""How many gradients an optimizer was given, and whether they are finite."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from muonwire.codec.host import fetch
from muonwire.errors import NonFiniteUpdateError
from muonwire.optim.kept import Question, wide_dtype
from muonwire.transport.shards import local

# Squares of larger norms, which Adam takes, overflow float32.
LARGEST_NORM = 1e18


class GradientCount:
    """Counts the gradients that an optimizer was given: those it stepped with, and those that were zeroed unused.

    Replicas that train in lockstep have the same count whenever they talk. One that left a step out zeroed a gradient
    unused and is ahead; one that stepped twice with the same gradient is behind.
    """

    def __init__(self) -> None:
        self.count = 0
        # Whether they are the mean of a site already, as where a step is repeated.
        self.averaged = False
        self._used: list[tuple[weakref.ref[Tensor], int]] = []

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; the next gradient of a copy counts as new.
        return {"count": self.count, "averaged": False, "_used": []}

    def take(self, params: Iterable[Tensor]) -> None:
        """Count a step with the parameters' gradients; gradients that were used before do not count again."""
        params = list(params)
        gradients = [p.grad for p in params if p.grad is not None]
        if not gradients or self._unused(gradients):
            self.count += 1
            self.averaged = False
        self.use(params)

    def discard(self, params: Sequence[Tensor], zero: Callable[[], None]) -> None:
        """Let ``zero`` zero the gradients; those that were not used count."""
        gradients = [p.grad for p in params if p.grad is not None]
        if gradients and self._unused(gradients):
            self.count += 1
        zero()
        self.averaged = False
        # Gradients that were zeroed in place are not new ones.
        self.use(params)

    def use(self, params: Iterable[Tensor]) -> None:
        """Remember the parameters' gradients as they are now as those that were used."""
        self._used = [(weakref.ref(g), local(g)._version) for g in (p.grad for p in params) if g is not None]

    def _unused(self, gradients: Sequence[Tensor]) -> bool:
        """Whether any gradient is new since the last step."""
        if len(gradients) != len(self._used):
            return True
        return any(
            ref() is not g or version != local(g)._version
            for g, (ref, version) in zip(gradients, self._used, strict=True)
        )


def are_finite(gradients: Sequence[Tensor], question: Question | None = None) -> bool:
    """Whether all entries are finite, and small enough that their squares are too; NaN is neither.

    Args:
        gradients: on any devices, each of which the host waits for once.
        question: answered by the same transfers. Default: none.
    """
    narrow = [g for g in gradients if g.element_size() < 4]
    wide = [g for g in gradients if g.element_size() >= 4]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in narrow]
    if wide:
        norms.append(torch.nn.utils.get_total_norm(wide))
    # The norm of sharded gradients is a DTensor.
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    asked = [] if question is None else question.differ
    found = fetch([t.float() for t in (*whole, *asked)])
    if question is not None:
        question.answers = [bool(answer[0]) for answer in found[len(whole) :]]
    return all(norm[0] <= LARGEST_NORM for norm in found[: len(whole)])


def find_problem(
    named_parameters: Iterable[tuple[str, Tensor]], question: Question | None = None
) -> str | None:
    """A text that names the first gradient that is not finite; None where all are finite. ``question``: see ``are_finite``."""
    named = [
        (name, p.grad.coalesce().values() if p.grad.is_sparse else local(p.grad))
        for name, p in named_parameters
        if p.grad is not None
    ]
    if not named or are_finite([g for _, g in named], question):
        return None
    for name, gradient in named:
        if not are_finite([gradient]):
            norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float32))
            return f"the gradient of {name} is not finite (its norm is {norm:g})"
    return f"the gradients' norm is above {LARGEST_NORM:g}, where squares are not finite in float32"


def not_finite(problem: str, *, step: int, rank: int) -> NonFiniteUpdateError:
    """The error that all replicas raise where something of one is not finite."""
    return NonFiniteUpdateError(
        f"ChainOptimizer: {problem} (step {step}, rank {rank}); no weight and no state has changed. Continue with the next batch, "
        'lower the learning rate, or resume from the last checkpoint; nonfinite="skip" leaves such steps out'
    )


def unscale(params: Iterable[Tensor], scale: Tensor | None, found_inf: Tensor | None) -> bool:
    """Undo GradScaler's scale, if it gave one; returns whether it found an overflow."""
    # One wait for both.
    found = iter(fetch([t.detach().float() for t in (found_inf, scale) if t is not None]))
    if found_inf is not None and next(found)[0] > 0:
        return True
    factor = 1 / float(next(found)[0]) if scale is not None else 1.0
    if factor != 1:
        for param in params:
            if param.grad is not None:
                local(param.grad).mul_(factor)
    return False


def wide_gradient(param: Tensor, *, zero: bool) -> Tensor:
    """This process's shard of the gradient in the dtype that stages compute in; zeros where there is none."""
    dtype = wide_dtype(param)
    if zero or param.grad is None:
        return torch.zeros_like(local(param), dtype=dtype)
    gradient = local(param.grad)
    return gradient if gradient.dtype is dtype else gradient.to(dtype)
