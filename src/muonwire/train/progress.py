"""Progress on the terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from muonwire.train.loop import Progress


@contextmanager
def progress_bar(
    label: str, *, enabled: bool = True, lines: bool = True
) -> Iterator[Callable[[Progress], None]]:
    """A bar with the loss on standard error; where that is not a terminal, a line an evaluation (unless ``lines`` is False)."""
    if not enabled:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:

        def print_line(progress: Progress) -> None:
            if lines and progress.eval_loss is not None:
                print(
                    f"{label}: step {progress.step}/{progress.steps}, evaluation loss {progress.eval_loss:.4f}",
                    flush=True,
                )

        yield print_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[losses]}"), console=console, transient=True) as bars:
        bar = bars.add_task(label, losses="")
        evaluated = ""

        def update(progress: Progress) -> None:
            nonlocal evaluated
            if progress.eval_loss is not None:
                evaluated = f", evaluation {progress.eval_loss:.3f}"
            losses = f"loss {progress.train_loss:.3f}{evaluated}"
            bars.update(bar, completed=progress.step, total=progress.steps, losses=losses)

        yield update
