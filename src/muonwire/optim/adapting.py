"""The interval of an optimizer whose H changes in the run: measured and agreed between replicas, or by a record.

What is known lies in the groups under "intervals", plain lists of whole numbers that a state dict carries: "steps" and
"intervals", a pair for each change, the first of step 0; "wait_us" and "step_us", the figures that each came from (0: none);
"window", the figures since the last change, each a wait and a step; and "next", an interval that is agreed, with its figures, and
begins when the present one is over.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from muonwire.optim.auto_interval import (
    AUTO,
    WINDOW,
    Figure,
    Spell,
    agreed,
    next_interval,
    of_site,
    typical,
)
from muonwire.transport.meter import Traffic

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer
    from muonwire.optim.settings import LocalSteps

# The groups' entry; see the file's beginning.
INTERVALS = "intervals"
# Purposes of the messages of a synchronization.
_PURPOSES = ("agreement", "update")


def first_intervals(local: "LocalSteps") -> dict[str, list[int]]:
    """The groups' entry before the first step."""
    alone = {"steps": [0], "intervals": [local.initial], "wait_us": [0], "step_us": [0]}
    return {**alone, "window": [], "next": []}


class Adapting:
    """Changes the interval of one optimizer.

    Args:
        optimizer: whose ``local`` has no fixed interval.

    Attributes:
        measure: the seconds of a clock, and those of them that this replica has stood still for synchronizations so far.
    """

    def __init__(self, optimizer: "ChainOptimizer") -> None:
        assert optimizer.local is not None
        self._optimizer = optimizer
        self._local = optimizer.local
        self.measure: Callable[[], tuple[float, float]] = self._measure
        # Clock, waiting and step when the last spell ended.
        self._since: tuple[float, float, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_optimizer": self._optimizer, "_local": self._local}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.measure, self._since = self._measure, None

    @property
    def state(self) -> dict[str, list[int]]:
        """The groups' entry; see the file's beginning."""
        state: dict[str, list[int]] = self._optimizer.param_groups[0][INTERVALS]
        return state

    def _set(self, **lists: list[int]) -> None:
        """Set entries, in a new dict: a state dict may hold the old one."""
        state = {**self.state, **lists}
        for group in self._optimizer.param_groups:
            group[INTERVALS] = state

    @property
    def now(self) -> int:
        """The present interval, H."""
        return self.state["intervals"][-1]

    @property
    def why_fixed(self) -> str:
        """Why "auto" changes nothing here; empty where it does."""
        transport = self._optimizer.transport
        if self._local.interval != AUTO:
            return ""
        if transport.takes_turns:
            return "replicas that take turns in one process do not wait for a link"
        alone = transport.world_size == 1 and self._optimizer.synchronizes
        return "one replica has nobody to wait for" if alone else ""

    def text(self) -> str:
        """The present interval in words."""
        reason = self.why_fixed
        return f"H stays {self.now}, since {reason}" if reason else f"H is now {self.now}"

    # Measuring

    def _measure(self) -> tuple[float, float]:
        by_purpose = self._optimizer.transport.meter.by_purpose
        return time.perf_counter(), sum(by_purpose.get(p, Traffic()).wait_s for p in _PURPOSES)

    def forget(self) -> None:
        """After other states were loaded, what was measured before belongs to other steps."""
        self._since = None

    def spell(self) -> bytes:
        """What this replica tells of the time since it told last; called right before a synchronization. Empty: nothing is told."""
        if self._local.interval != AUTO or self.why_fixed:
            return b""
        transport, own = self._optimizer.transport, self._spell().pack()
        # What a site sends must be the same on all its replicas.
        return own if transport.num_inside == 1 else of_site(transport.gather_inside(own))

    def _spell(self) -> Spell:
        if self._optimizer.transport.observes:
            self._since = None
            return Spell()
        (now_s, waited_s), step = self.measure(), self._optimizer.num_steps
        since, self._since = self._since, (now_s, waited_s, step)
        if since is None or step <= since[2]:
            return Spell()
        wait_us = max(round(1e6 * (waited_s - since[1])), 0)
        own_us = max(round(1e6 * (now_s - since[0])) - wait_us, 0)
        return Spell(wait_us=wait_us, own_us=own_us, num_steps=step - since[2])

    # Changing

    def note(self, spells: list[bytes]) -> None:
        """Take what all replicas told in a synchronization that succeeded; all replicas do it in the same order."""
        figure = agreed(spells) if any(spells) else None
        if figure is None:
            return
        window = [*self.state["window"], figure.wait_us, figure.step_us][-2 * WINDOW :]
        self._set(window=window)
        if len(window) < 2 * WINDOW:
            return
        pairs = zip(window[::2], window[1::2], strict=True)
        middle = typical([Figure(wait_us=w, step_us=s) for w, s in pairs])
        local = self._local
        following = next_interval(middle, interval=self.now, share=local.share, bounds=local.intervals)
        if following != self.now:
            self._set(window=[], next=[following, middle.wait_us, middle.step_us])

    def begin(self) -> int:
        """Begin an interval after the present step, and return its H; a change is recorded."""
        step, state = self._optimizer.num_steps, self.state
        wait_us = step_us = 0
        if self._local.record:
            following = next(h for at, h in reversed(self._local.record) if at <= step)
        elif state["next"]:
            following, wait_us, step_us = state["next"]
        else:
            following = self.now
        if following != self.now:
            self._set(
                steps=[*state["steps"], step],
                intervals=[*state["intervals"], following],
                wait_us=[*state["wait_us"], wait_us],
                step_us=[*state["step_us"], step_us],
                next=[],
            )
        return following
