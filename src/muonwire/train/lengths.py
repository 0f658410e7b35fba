"""The length of a run, which a resume may change, and what that does to the learning rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from muonwire.errors import UsageError
from muonwire.train.config import TrainConfig

# Keys of a run's identity for its length; LENGTHS is there only where the length was changed.
STEPS, LENGTHS = "steps", "lengths"


@dataclass(frozen=True, kw_only=True)
class Length:
    """The number of steps that a run was to have, and since when.

    Args:
        steps: of the whole run.
        first_step: the first step that was trained with this length.
    """

    steps: int
    first_step: int = 1


def lengths_of(identity: Mapping[str, Any]) -> tuple[Length, ...]:
    """All lengths of the run whose settings these are, in order; the last is the one that it has now.

    >>> lengths_of({"steps": 10})
    (Length(steps=10, first_step=1),)
    """
    saved = identity.get(LENGTHS) or [{"steps": identity[STEPS], "first_step": 1}]
    return tuple(Length(**length) for length in saved)


def extend(lengths: Sequence[Length], config: TrainConfig, *, done: int) -> tuple[Length, ...]:
    """``lengths``, and the number of steps that ``config`` asks for where it is another one.

    Args:
        lengths: of the run so far.
        config: what it is to go on with.
        done: steps that are done.

    Raises:
        UsageError: the new length leaves no step to train, or only steps whose rate is zero.
    """
    now = lengths[-1].steps
    if config.steps == now:
        return tuple(lengths)
    if config.steps <= done:
        raise UsageError(
            f"train: steps is {config.steps}, but {done} of the run's {now} steps are done; give {now} to keep its length, a "
            f"number above {done} to change it, or choose another --out"
        )
    if not any(config.lr_factor(step) for step in range(done + 1, config.steps + 1)):
        raise UsageError(
            f"train: steps is {config.steps}, and from step {done + 1} on the {config.schedule} schedule of that length has the "
            "rate 0, so nothing would be trained; give more steps"
        )
    return (*lengths, Length(steps=config.steps, first_step=done + 1))


def rate_change(lengths: Sequence[Length], config: TrainConfig) -> str | None:
    """One line on what the newest length does to the rate; None where all steps so far had the rates that it gives them.

    >>> longer = (Length(steps=10), Length(steps=20, first_step=11))
    >>> line = rate_change(longer, TrainConfig(lr=0.01, steps=20, schedule="linear", lr_floor=0.0, warmup_steps=0))
    >>> line.split("; ")[0]
    'the rate follows the linear schedule of 20 steps from step 11 on: 0.00474 in step 11, 0 in step 20'
    >>> line.split("; ")[1]
    'so far that of 10, 0 in step 10'
    >>> rate_change(longer, TrainConfig(lr=0.01, steps=20, schedule="constant")) is None
    True
    """
    *past, new = lengths
    ends = [later.first_step - 1 for later in lengths[1:]]
    if all(
        config.lr_factor(step, steps=length.steps) == config.lr_factor(step, steps=new.steps)
        for length, end in zip(past, ends, strict=True)
        for step in range(length.first_step, end + 1)
    ):
        return None

    def rate(step: int, steps: int) -> str:
        return f"{config.lr * config.lr_factor(step, steps=steps):.3g} in step {step}"

    ahead = [rate(step, new.steps) for step in dict.fromkeys((new.first_step, new.steps))]
    behind = [
        f"that of {length.steps}, {rate(end, length.steps)}" for length, end in zip(past, ends, strict=True)
    ]
    return (
        f"the rate follows the {config.schedule} schedule of {new.steps} steps from step {new.first_step} on: "
        f"{', '.join(ahead)}; so far {', then '.join(behind)}"
    )
