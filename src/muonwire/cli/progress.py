"""A bar for commands that work through a list of named inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count


@contextmanager
def bench_bar(label: str, *, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, where that is a terminal, that names what is being measured.

    What it yields is called with the name of each input when its turn begins.

    Args:
        label: what stands before the bar.
        total: how many inputs there are.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        bar = bars.add_task("", total=total)
        begun = count()
        yield lambda name: bars.update(bar, description=name, completed=next(begun))
