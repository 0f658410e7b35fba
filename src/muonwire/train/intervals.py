"""The record of an interval that follows the link: intervals.json in the run's folder, by which the run can be repeated.

    format       1
    recipe       in textual form
    changes      a list: the "step" after which "interval" holds; from the second on, with "auto", the "wait_us" of a
                 synchronization and the "step_us" of a step that it follows from, in microseconds

``interval="FOLDER/intervals.json"`` takes the same steps again, whatever the link. ``events.jsonl`` has a line for each change, and
the lines of ``metrics.jsonl`` that tell of synchronizations have "synchronization/interval".
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from muonwire.optim import ChainOptimizer
from muonwire.train.checkpoint import write_json
from muonwire.train.events import Events

INTERVALS = "intervals.json"
FORMAT = 1


class IntervalRecord:
    """Keeps the record of one run; nothing where the interval is a fixed number.

    Args:
        optimizer: of this replica.
        folder: of the run.
        recipe: in textual form.
        enabled: whether this replica writes the record.
    """

    def __init__(self, optimizer: ChainOptimizer, folder: Path, *, recipe: str, enabled: bool) -> None:
        self._adapting = optimizer.adapting
        self._folder = folder
        self._recipe = recipe
        self._enabled = enabled
        self._known = 1 if self._adapting is None else len(self._adapting.state["steps"])
        self._write()

    def _changes(self) -> list[dict[str, int]]:
        assert self._adapting is not None
        state = self._adapting.state
        rows = zip(state["steps"], state["intervals"], state["wait_us"], state["step_us"], strict=True)
        return [
            {"step": step, "interval": interval, **({"wait_us": wait, "step_us": own} if own else {})}
            for step, interval, wait, own in rows
        ]

    def _write(self) -> None:
        if self._adapting is not None and self._enabled:
            record = {"format": FORMAT, "recipe": self._recipe, "changes": self._changes()}
            write_json(self._folder / INTERVALS, record)

    def stepped(self, events: Events | None, say: Callable[[str], None]) -> None:
        """After an optimizer step: record the changes since the last one, and tell of them."""
        if self._adapting is None or len(self._adapting.state["steps"]) == self._known:
            return
        changes = self._changes()
        new, self._known = changes[self._known :], len(changes)
        self._write()
        for change in new:
            if events is not None:
                events.add("interval", **change)
            if self._enabled:
                say(_told(change))

    def with_interval(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """Figures of synchronizations with the present interval beside them."""
        if self._adapting is None or not figures:
            return dict(figures)
        return {**figures, "synchronization/interval": self._adapting.now}


def _told(change: Mapping[str, int]) -> str:
    text = f"H is {change['interval']} from step {change['step'] + 1} on"
    if "wait_us" not in change:
        return text
    wait_s, step_s = change["wait_us"] / 1e6, change["step_us"] / 1e6
    return f"{text}: replicas wait {wait_s:.3g} s a synchronization, and a step takes {step_s:.3g} s"
