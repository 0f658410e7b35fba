"""Progress on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from muonwire.train.loop import Progress
from muonwire.transport.waiting import to_stderr


class Display:
    """What shows a run's progress: called after a step, and told of waits that take long.

    Args:
        update: shows a step.
        say: prints a line.
        wait: shows for whom the run waits now; "" for nobody.
    """

    def __init__(
        self,
        update: Callable[[Progress], None],
        *,
        say: Callable[[str], None] = to_stderr,
        wait: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._update = update
        self.say = say
        self.wait = wait

    def __call__(self, progress: Progress) -> None:
        """Show a step."""
        self._update(progress)


@contextmanager
def progress_bar(label: str, *, enabled: bool = True, lines: bool = True) -> Iterator[Display]:
    """A bar with the loss on standard error; where that is not a terminal, a line an evaluation (unless ``lines`` is False).

    Both have the share of the time in which the replica has waited for others, where there are any.

    In a wait the bar says for whom and how long; without a bar, lines on standard error do.
    """
    if not enabled:
        yield Display(lambda _: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:

        def print_line(progress: Progress) -> None:
            if lines and progress.eval_loss is not None:
                print(
                    f"{label}: step {progress.step}/{progress.steps}, evaluation loss {progress.eval_loss:.4f}"
                    f"{_waiting(progress)}",
                    flush=True,
                )

        yield Display(print_line)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[losses]}"), console=console, transient=True) as bars:
        bar = bars.add_task(label, losses="")
        evaluated = losses = ""

        def update(progress: Progress) -> None:
            nonlocal evaluated, losses
            if progress.eval_loss is not None:
                evaluated = f", evaluation {progress.eval_loss:.3f}"
            losses = f"loss {progress.train_loss:.3f}{evaluated}{_waiting(progress)}"
            bars.update(bar, completed=progress.step, total=progress.steps, losses=losses)

        def wait(text: str) -> None:
            bars.update(bar, losses=text or losses, refresh=True)

        def say(line: str) -> None:
            # What lasts is in the bar; that it is over stays on the screen.
            if not line.startswith("waiting"):
                console.print(line, highlight=False)

        yield Display(update, say=say, wait=wait)


def _waiting(progress: Progress) -> str:
    return "" if progress.wait_share is None else f", waits {100 * progress.wait_share:.1f} % of the time"
