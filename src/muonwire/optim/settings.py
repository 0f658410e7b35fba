"""Settings of an optimizer beside its chains: its start, values that are not finite, 16-bit weights, local steps."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from muonwire.errors import UsageError
from muonwire.optim.auto_interval import AUTO, Interval, Record, as_record, read_record

STARTS = ("check", "broadcast")
NONFINITE = ("raise", "skip")
MERGES = ("fixed", "arrival")


@dataclass(frozen=True, kw_only=True)
class Lifecycle:
    """Settings that every optimizer takes, whatever its chains.

    Args:
        start: "check" before the first step that all replicas hold the same weights and began with the same buffers; or "broadcast"
            those of replica 0 when the optimizer is built, which all replicas then build together. Default: "check".
        nonfinite: a gradient or update that is not finite on one replica raises NonFiniteUpdateError on all ("raise"), or the step
            is left out on all and counted ("skip"). Default: "raise".
        masters: keep float32 copies of 16-bit weights, to which small updates add up. Default: True.
        exclude_buffers: regular expressions; floating buffers whose name matches are not averaged over the replicas. Default: none.

    Raises:
        UsageError: a value that is not allowed, or a pattern that is no regular expression.
    """

    start: str = "check"
    nonfinite: str = "raise"
    masters: bool = True
    exclude_buffers: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise UsageError(f"optimizer: start is {self.start!r}; allowed are {' and '.join(STARTS)}")
        if self.nonfinite not in NONFINITE:
            raise UsageError(
                f"optimizer: nonfinite is {self.nonfinite!r}; allowed are {' and '.join(NONFINITE)}"
            )
        for pattern in self.exclude_buffers:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(
                    f"optimizer: exclude_buffers has {pattern!r}, which is no regular expression ({error})"
                ) from error


@dataclass(frozen=True, kw_only=True)
class LocalSteps:
    """Replicas step alone, and exchange the changes of their weights every H steps.

    With a the shared weights, the same on all replicas, and w a replica's own: Δ = a − w goes through the group's outer chain,
    which exchanges it; a ← a − outer_lr · Δ̄; w ← a. The shared weights move by decoded payloads and element-wise arithmetic only.

    Args:
        interval: H, local steps a synchronization, at least 1. "auto": what keeps waiting below a share of the time, as
            muonwire.optim.auto_interval computes it; or the record of such a run, which takes the same steps anywhere: pairs of a
            step and the interval from there on, or the path of the run's intervals.json.
        growth: steps by which H grows with every local step, at least 0: after t steps H is interval + growth · t. Default: 0.
        share: with "auto", the largest share of the time that may go to waiting for exchange, between 0 and 1. Default: 0.05.
        intervals: with "auto", the least and the largest H. Default: 4 and 128.
        first_interval: with "auto", H until replicas know how long they wait. Default: the least.
        outer_lr: rate of the outer step, positive. Default: 1.
        fragments: F, parts of about equal size into which the model is cut, from 1 to the least H; each synchronizes every H steps,
            H/F steps after the one before it. Default: 1.
        delay: local steps that replicas go on taking while what a fragment has sent travels, from 0 to the least H − 1; its
            result is merged after so many, and waited for where it is not there. Default: 0.
        mix: what a replica keeps of its own steps meanwhile, in [0, 1]: with aₜ its weights when they were sent, a ← s + mix · (a −
            aₜ), s being the new shared weights. Default: 0.5, which cost less than 1 (docs/experiments.md).
        merge: "fixed" merges after ``delay`` steps, which is reproducible; "arrival" in the first step that begins on all replicas
            after the result is there, which is not: the step follows from the speed of the link. Default: "fixed".

    Raises:
        UsageError: a value that is not allowed.

    Source: Douillard et al., "DiLoCo", arXiv 2311.08105, algorithm 1; Stich, "Local SGD", arXiv 1805.09767; of fragments and delay:
    Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512.
    """

    interval: Interval
    growth: float = 0.0
    share: float = 0.05
    intervals: Sequence[int] = (4, 128)
    first_interval: int | None = None
    outer_lr: float = 1.0
    fragments: int = 1
    delay: int = 0
    mix: float = 0.5
    merge: str = "fixed"

    def __post_init__(self) -> None:
        self._check_interval()
        if self.growth < 0:
            raise UsageError(
                f"local steps: growth is {self.growth}; it must be at least 0 steps a local step"
            )
        if not self.outer_lr > 0:
            raise UsageError(f"local steps: outer_lr is {self.outer_lr}; it must be positive")
        least = self.least
        if not 1 <= self.fragments <= least:
            raise UsageError(
                f"local steps: fragments is {self.fragments}; with an interval (H) of {least} it must be from 1 to "
                f"{least}, so that one is sent in a step at most"
            )
        if not 0 <= self.delay < least:
            raise UsageError(
                f"local steps: delay is {self.delay}; with an interval (H) of {least} it must be from 0 to "
                f"{least - 1}, so that a result is merged before its fragment is sent again"
            )
        if not 0 <= self.mix <= 1:
            raise UsageError(f"local steps: mix is {self.mix}; it must be in [0, 1]")
        if self.merge not in MERGES:
            raise UsageError(
                f"local steps: merge is {self.merge!r}; allowed are {' and '.join(map(repr, MERGES))}"
            )
        if self.merge == "arrival" and self.delay:
            raise UsageError(
                f"local steps: delay is {self.delay} with merge='arrival', which merges whenever a result is there; leave delay "
                "out, or use merge='fixed'"
            )

    def _check_interval(self) -> None:
        """Check H, and read a record of it."""
        given = self.interval
        if isinstance(given, str):
            if given != AUTO:
                object.__setattr__(self, "interval", read_record(given))
        elif isinstance(given, list | tuple):
            object.__setattr__(self, "interval", as_record(given))
        elif not isinstance(given, Integral) or given < 1:
            raise UsageError(
                f"local steps: interval (H) is {given}; it must be a whole number, at least 1 local step a synchronization"
            )
        else:
            object.__setattr__(self, "interval", int(given))
        if self.adapts and self.growth:
            raise UsageError(
                f"local steps: growth is {self.growth} with interval={given!r}, which says H by itself; leave growth out, or give "
                "a number for the interval"
            )
        if not 0 < self.share < 1:
            raise UsageError(
                f"local steps: share is {self.share}; it lies between 0 and 1, such as 0.05 for a twentieth of the time"
            )
        bounds = tuple(self.intervals)
        if len(bounds) != 2 or not all(type(h) is int for h in bounds) or not 1 <= bounds[0] <= bounds[1]:
            raise UsageError(
                f"local steps: intervals is {self.intervals}; wanted are the least and the largest interval (H), such as (4, 128)"
            )
        object.__setattr__(self, "intervals", bounds)
        if self.first_interval is not None and not bounds[0] <= self.first_interval <= bounds[1]:
            raise UsageError(
                f"local steps: first_interval is {self.first_interval}; with intervals={bounds} it must be from {bounds[0]} to "
                f"{bounds[1]}"
            )

    @property
    def adapts(self) -> bool:
        """Whether H changes otherwise than by ``growth``: with the link, or by a record."""
        return isinstance(self.interval, str | tuple)

    @property
    def record(self) -> Record:
        """The record that H follows; empty where it follows none."""
        return tuple((at, h) for at, h in self.interval) if isinstance(self.interval, tuple) else ()

    @property
    def initial(self) -> int:
        """H of the first interval."""
        if isinstance(self.interval, int):
            return self.interval
        if self.record:
            return self.record[0][1]
        return self.intervals[0] if self.first_interval is None else self.first_interval

    @property
    def least(self) -> int:
        """The least H that the run may have, without ``growth``."""
        if self.record:
            return min(h for _, h in self.record)
        return self.interval if isinstance(self.interval, int) else self.intervals[0]

    @property
    def streams(self) -> bool:
        """Whether fragments synchronize at different times, or replicas go on while messages travel."""
        return self.fragments > 1 or self.delay > 0 or self.merge != "fixed"

    def due(self, *, local_step: int, alone: int, interval: int | None = None) -> bool:
        """Whether replicas that have taken ``local_step`` steps, ``alone`` of them since the last synchronization, synchronize.

        Args:
            local_step: steps taken.
            alone: of them since the last synchronization.
            interval: the present H where it changes. Default: that of the first interval.
        """
        return alone >= (self.initial if interval is None else interval) + self.growth * local_step

    def __str__(self) -> str:
        text = f"local steps, synchronized every {self.initial}"
        if self.growth:
            text += f", growing by {self.growth:g} a step"
        if self.interval == AUTO:
            low, high = self.intervals
            text += f" at first, then so often that waiting stays below {100 * self.share:g} % of the time (H from {low} to {high})"
        elif self.record:
            text += (
                f" at first, then by a record of {len(self.record) - 1} change{'s' * (len(self.record) != 2)}"
            )
            text += f" ({zlib.crc32(repr(self.record).encode()):08x})"
        if not self.streams:
            return text
        when = f"{self.delay} later" if self.merge == "fixed" else "on arrival"
        return f"{text} in {self.fragments} fragment{'s' * (self.fragments != 1)}, merged {when}, mix={self.mix:g}"
