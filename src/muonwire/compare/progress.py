"""Progress of a whole comparison: one bar over the steps of all runs, or a line for each finished run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from muonwire.compare.config import Comparison
from muonwire.compare.runs import Result, Run, find_result, plan

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 14
# Drawing takes time from the replicas.
REFRESHES_PER_S = 2


class Tally:
    """What is done and what is left of a comparison.

    Args:
        config: the comparison.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, config: Comparison, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._running: dict[Run, int] = {}
        self._trained = 0
        self._start_s = clock()
        self._done, self._left = plan(config)

    @property
    def running(self) -> list[Run]:
        """The runs that have begun and not ended."""
        return list(self._running)

    @property
    def runs(self) -> tuple[int, int]:
        """How many runs are finished, and how many there are, as far as is known."""
        return len(self._done), len(self._done) + len(self._left)

    @property
    def steps(self) -> tuple[int, int]:
        """The same of their steps; those of running ones count."""
        return sum(self._done) + sum(self._running.values()), sum(self._done) + sum(self._left)

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes at the speed so far; None before the first step."""
        done, total = self.steps
        return (total - done) * (self._clock() - self._start_s) / self._trained if self._trained else None

    def at(self, run: Run, step: int) -> None:
        """``run`` has come to ``step``; the first call sets where it begins."""
        self._trained += step - self._running.get(run, step)
        self._running[run] = step

    def finish(self, run: Run) -> None:
        """``run`` is finished, and its result written."""
        self._running.pop(run, None)
        self._done, self._left = plan(self._config)

    def line(self, run: Run, result: Result) -> str:
        """What a finished run came to, how many of all runs are finished, and the time that the rest takes."""
        loss = result["final_eval_loss"]
        outcome = "diverged" if loss is None else f"loss {loss:.4f}"
        done, total = self.runs
        left = "" if done == total or self.left_s is None else f", {time_text(self.left_s)} left"
        bits = f"{result['bits_per_parameter_step']:.3g} bit/param"
        return f"{run}: {outcome}, {bits} ({done} of {total} runs{left})"


def time_text(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> time_text(65), time_text(3599.7)
    ('1:05', '1:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Shown:
    """A tally with its display.

    Args:
        config: the comparison.
        tally: of it; None shows nothing.
        redraw: called when the tally has changed.
        report: called with the line of each finished run.
    """

    def __init__(
        self,
        config: Comparison,
        tally: Tally | None,
        *,
        redraw: Callable[[], object] = lambda: None,
        report: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._find, self._tally, self._redraw, self._report = find_result(config), tally, redraw, report

    def at(self, run: Run, step: int) -> None:
        """``run`` has come to ``step``."""
        if self._tally is not None:
            self._tally.at(run, step)
            self._redraw()

    def finish(self, run: Run) -> None:
        """``run`` is finished."""
        if self._tally is not None:
            self._tally.finish(run)
            result = self._find(run)
            if result is not None:
                self._report(self._tally.line(run, result))
            self._redraw()


@contextmanager
def comparison_progress(
    config: Comparison, *, enabled: bool = True, console: "Console | None" = None
) -> Iterator[Shown]:
    """Progress of all runs: a bar on standard error, or where that is no terminal a line on standard output for each finished run.

    Args:
        config: the comparison.
        enabled: False shows nothing.
        console: where to draw. Default: standard error.
    """
    if not enabled:
        yield Shown(config, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = console or Console(stderr=True)
    tally = Tally(config)
    if not console.is_terminal:
        yield Shown(config, tally, report=lambda line: print(line, flush=True))
        return
    columns = (
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        # Options in brackets are no markup.
        TextColumn(
            "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
        ),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=REFRESHES_PER_S) as bars:
        bar = bars.add_task("", completed=tally.steps[0], total=tally.steps[1], left="")

        def redraw() -> None:
            done, total = tally.steps
            left = "" if tally.left_s is None else f"{time_text(tally.left_s)} left"
            running = ", ".join(map(str, tally.running))
            bars.update(bar, description=running, completed=done, total=total, left=left)

        yield Shown(config, tally, redraw=redraw)
