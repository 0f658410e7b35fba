"""The learning rate over a run."""

import math


def lr_factor(step: int, *, steps: int, warmup_steps: int, kind: str, floor: float) -> float:
    """Learning rate of ``step`` (the first is 1) as a share of its peak.

    A linear rise over ``warmup_steps``, then constant, or a fall to ``floor`` at the last step: linear, or half a cosine.

    >>> [round(lr_factor(s, steps=5, warmup_steps=1, kind="linear", floor=0.0), 2) for s in range(1, 6)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step <= warmup_steps:
        return step / warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step - max(warmup_steps, 1)) / max(steps - max(warmup_steps, 1), 1)
    left = 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * left
