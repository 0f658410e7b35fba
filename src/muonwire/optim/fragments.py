"""Fragments: into which parts a model is cut, and when each is due."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.kept import wide_dtype
from muonwire.optim.settings import LocalSteps
from muonwire.stages.base import State

# The groups' entry with the fragments' numbers; see ``first_counts``.
FRAGMENTS = "fragments"


def empty_fragment(param: Tensor, *, index: int) -> State:
    """A parameter's state under "fragment" where nothing is in flight."""
    nothing = torch.empty(0, dtype=wide_dtype(param), device=param.device)
    return {"index": index, "sent": nothing, "arrived": nothing.clone()}


def first_counts(local: LocalSteps, *, step: int = 0, interval: int | None = None) -> dict[str, list[int]]:
    """The fragments' numbers when all have just been synchronized, in ``step``: the first is sent H/F steps later, and so on.

    Where H changes in the run there is one more number a fragment, its "gaps": steps from its last message to the next.

    >>> first_counts(LocalSteps(interval=11, fragments=4))["sent"]
    [-8, -5, -2, 0]

    Args:
        local: the settings.
        step: in which the interval begins. Default: 0.
        interval: H. Default: that of the first interval.
    """
    count, interval = local.fragments, local.initial if interval is None else interval
    return {
        "sent": [step + -(-interval * (f + 1) // count) - interval for f in range(count)],
        "synchronized": [step] * count,
        "merge": [0] * count,
        "rounds": [0] * count,
        **({"gaps": [interval] * count} if local.adapts else {}),
    }


def model_order(params: Iterable[Tensor], model: nn.Module | None) -> list[Tensor]:
    """``params``, those of the model first and in its order."""
    trained = dict.fromkeys(params)
    known: Iterable[Tensor] = () if model is None else model.parameters()
    return list({**dict.fromkeys(p for p in known if p in trained), **trained})


def cut(sizes: Sequence[int], count: int) -> list[int]:
    """The fragment of each of a row of parameters: consecutive ones of about equal size together, each fragment with one at least.

    >>> cut([4, 4, 1, 1, 6, 8], 3)
    [0, 0, 1, 1, 1, 2]

    Args:
        sizes: numbers of entries.
        count: of fragments.

    Raises:
        UsageError: there are fewer parameters than fragments.
    """
    if len(sizes) < count:
        raise UsageError(
            f"local steps: fragments is {count}, and there are {len(sizes)} trained tensors; a fragment holds at least one"
        )
    found: list[int] = []
    index, within, left = 0, 0, sum(sizes)
    target = left / count
    for i, size in enumerate(sizes):
        must = len(sizes) - i <= count - 1 - index
        # To the next fragment where this one comes closer to its share without the parameter than with it.
        if within and index < count - 1 and (must or within + size / 2 > target):
            index, left = index + 1, left - within
            within, target = 0, left / (count - index)
        found.append(index)
        within += size
    return found
