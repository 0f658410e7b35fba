"""A stage out of a function of one tensor: it keeps no state and does not talk to other replicas."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, States, Tensors

Function = Callable[[Tensor], Tensor] | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Plain(Stage):
    """u ← function(u), or function(u, w) with w the weight, tensor by tensor; ``plain`` makes it.

    Args:
        function: of the update, or of the update and the parameter; writes to neither.
        label: the stage's name.
        takes_param: whether the function is given the parameter too.
    """

    function: Callable[..., Tensor]
    label: str
    takes_param: bool

    @property
    @override
    def name(self) -> str:
        return self.label

    @property
    @override
    def reads_params(self) -> bool:
        return self.takes_param

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """Apply the function to each update.

        Raises:
            UsageError: the function returned something other than a tensor of the update's shape and dtype.
        """
        results = []
        for i, (update, param) in enumerate(zip(updates, params, strict=True)):
            result = self.function(update, param) if self.takes_param else self.function(update)
            if _kind(result) != _kind(update):
                of = context.names[i] if context.names else f"tensor {i}"
                raise UsageError(
                    f"{self.label}: the function returned {_kind(result)} for the update of {of}; {_kind(update)} is wanted"
                )
            results.append(result)
        return results

    def __str__(self) -> str:
        return self.label


def plain(function: Function, *, name: str) -> Plain:
    """A stage that applies a function to each update by itself, as optax's ``stateless`` does.

    The update is a gradient at the start of a chain, and what is subtracted from the weight, over the learning rate, at its end.
    All replicas must use the same function; their chains are compared by their names. The stage can be pickled where the
    function can, as one that a module defines, and a lambda not.

    Args:
        function: of the update, or of the update and the parameter, if it has two positional arguments without defaults; returns
            a tensor of the update's shape and dtype, and writes to neither argument. One whose arguments cannot be read, as those
            written in C, is given the update.
        name: how chains and their states call it: not empty and without a dot.

    Raises:
        UsageError: a function of no or of three and more arguments, or a name that is not allowed.

    >>> from muonwire.stages import Momentum, chain
    >>> print(chain(plain(lambda update: update.clamp(-1, 1), name="clip"), Momentum(beta=0.9)))
    clip → momentum(beta=0.9, nesterov=True, form=ema)
    >>> decay = plain(lambda update, param: update + 0.1 * param.sign(), name="decay")
    """
    if not name or "." in name:
        raise UsageError(
            f"plain: name is {name!r}; a text without a dot is wanted, under which the chain knows it"
        )
    wanted = _num_arguments(function)
    if wanted not in (1, 2):
        raise UsageError(
            f"plain: {name}'s function has {wanted} positional arguments without defaults; allowed are 1, the update, "
            "and 2, the update and the parameter"
        )
    return Plain(function=function, label=name, takes_param=wanted == 2)


def _num_arguments(function: Callable[..., Any]) -> int:
    """How many positional arguments have no default; 1 where all are optional or the signature cannot be read."""
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    needed = sum(a.default is a.empty for a in positional)
    takes_any = len(positional) > needed or any(a.kind is a.VAR_POSITIONAL for a in arguments)
    return 1 if needed == 0 and takes_any else needed


def _kind(value: Any) -> str:
    """A tensor's shape and dtype, or the type of anything else, for messages."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
