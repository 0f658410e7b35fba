"""An interval that follows the link: how H comes from the time that replicas wait and from that of a step, and the record of it.

Each replica measures from one synchronization to the next: w, the time that it stood still for exchange, and c, the rest of the
time, over n steps. The replicas tell each other, and take the least w (the others waited for a slower replica, too, which no H
changes) and the largest s = c / n (of the slowest). With the medians w̃ and s̃ of the last three such figures

    H* = w̃ (1 − share) / (share · s̃)

is the interval at which w̃ is the share of w̃ + H* s̃. Where H* > H, the next H is min(⌈H*⌉, 2H); where H* < ¾ H, it is
max(⌈H*⌉, ⌊¾ H⌋); both within the bounds; else H stays. After a change the figures begin anew. All figures are whole microseconds,
and the rest is exact rational arithmetic, so all replicas find the same H.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from statistics import median_low

from muonwire.errors import ExchangeError, UsageError

AUTO = "auto"
# A number; "auto"; or a record, as pairs of a step and the interval from there on, or as the path of a file.
Interval = int | str | Sequence[Sequence[int]]
Record = tuple[tuple[int, int], ...]
# Figures of which the median counts.
WINDOW = 3
_LARGEST = 2**31
_SPELL = struct.Struct("<QQI")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What all replicas agree on: microseconds of waiting a synchronization, and of a step."""

    wait_us: int
    step_us: int


@dataclass(frozen=True, kw_only=True)
class Spell:
    """What one replica measured between two synchronizations; nothing where it took no steps.

    Args:
        wait_us: microseconds that it stood still for exchange.
        own_us: the others.
        num_steps: that it took.
    """

    wait_us: int = 0
    own_us: int = 0
    num_steps: int = 0

    def pack(self) -> bytes:
        """As it travels."""
        return _SPELL.pack(self.wait_us, self.own_us, self.num_steps)


SPELL_BYTES = _SPELL.size


def of_site(messages: Sequence[bytes]) -> bytes:
    """What a site tells as one replica: the least waiting of its replicas, and the steps of its slowest."""
    measured = [spell for spell in map(_SPELL.unpack, messages) if spell[2]]
    if not measured:
        return Spell().pack()
    _, own_us, num_steps = max(measured, key=lambda spell: spell[1] / spell[2])
    return Spell(wait_us=min(spell[0] for spell in measured), own_us=own_us, num_steps=num_steps).pack()


def agreed(messages: Sequence[bytes]) -> Figure | None:
    """What follows from all replicas' packed spells; None where none has measured anything.

    Raises:
        ExchangeError: a message has another length.
    """
    if any(len(message) != SPELL_BYTES for message in messages):
        raise ExchangeError(
            'replicas disagree on how they measure waiting for interval="auto"; run the same muonwire on all replicas'
        )
    spells = [_SPELL.unpack(message) for message in messages]
    measured = [(wait_us, own_us // n) for wait_us, own_us, n in spells if n]
    if not measured:
        return None
    waits_us, steps_us = zip(*measured, strict=True)
    return Figure(wait_us=min(waits_us), step_us=max(*steps_us, 1))


def typical(figures: Sequence[Figure]) -> Figure:
    """The medians."""
    return Figure(
        wait_us=median_low(f.wait_us for f in figures), step_us=median_low(f.step_us for f in figures)
    )


def next_interval(figure: Figure, *, interval: int, share: float, bounds: Sequence[int]) -> int:
    """The interval that follows on ``interval``; see the file's beginning.

    >>> figure = Figure(wait_us=1_000_000, step_us=500_000)
    >>> [next_interval(figure, interval=h, share=0.05, bounds=(4, 128)) for h in (11, 30, 38, 50, 60)]
    [22, 38, 38, 50, 45]

    Args:
        figure: the medians.
        interval: H so far.
        share: largest share of the time that may go to waiting.
        bounds: the least and the largest interval.
    """
    exact = Fraction(share)
    wanted = figure.wait_us * (1 - exact) / (exact * figure.step_us)
    if wanted > interval:
        found = min(math.ceil(wanted), 2 * interval)
    elif 4 * wanted < 3 * interval:
        found = max(math.ceil(wanted), 3 * interval // 4)
    else:
        found = interval
    least, most = bounds
    return min(max(found, least), most)


def as_record(given: Sequence[Sequence[int]]) -> Record:
    """Pairs of a step and the interval from there on, checked.

    >>> as_record([(0, 11), (33, 22)])
    ((0, 11), (33, 22))

    Raises:
        UsageError: they are no such pairs, do not begin at step 0, or do not ascend.
    """
    pairs = [tuple(pair) if isinstance(pair, Sequence) else () for pair in given]
    whole = all(len(p) == 2 and all(type(n) is int and 0 <= n < _LARGEST for n in p) and p[1] for p in pairs)
    steps = [p[0] for p in pairs] if whole else []
    if not pairs or not whole or steps[0] != 0 or steps != sorted(set(steps)):
        raise UsageError(
            f"local steps: interval is the record {str(given)[:100]}; wanted are pairs of a step and the interval from there on, "
            "the first of step 0 and the others in order, such as [(0, 11), (33, 22)]"
        )
    return tuple((p[0], p[1]) for p in pairs)


def read_record(path: str) -> Record:
    """The record that `muonwire train` keeps of a run, in ``intervals.json`` of its folder.

    Raises:
        UsageError: there is no such file, or it holds something else.
    """
    try:
        changes = json.loads(Path(path).read_text())["changes"]
        return as_record([(change["step"], change["interval"]) for change in changes])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"local steps: interval is {path!r}, which is no record of intervals ({error}); give a number, 'auto', or the path of "
            "the intervals.json that a run with interval='auto' has left in its folder"
        ) from error
