"""Times of calls, beside what they give."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def median_times(
    calls: Mapping[K, Callable[[], Tensor]], *, turns: int, keep: Callable[[Tensor], T]
) -> dict[K, tuple[float, T]]:
    """The median seconds of each call, and what is kept of its first result.

    The calls take turns, so that a change of the machine's load meets all alike.

    Args:
        calls: by name.
        turns: how many each takes.
        keep: what to keep of a call's result, so that large ones need not be held.
    """
    spent: dict[K, list[float]] = {}
    kept: dict[K, T] = {}
    for _ in range(turns):
        for name, call in calls.items():
            start_s = time.perf_counter()
            result = call()
            spent.setdefault(name, []).append(time.perf_counter() - start_s)
            if name not in kept:
                kept[name] = keep(result)
    return {name: (statistics.median(spent[name]), kept[name]) for name in calls}
