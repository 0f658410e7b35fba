"""`muonwire status`."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from muonwire.cli.arguments import command
from muonwire.train.page import write_page
from muonwire.train.status import DIED, ELSEWHERE, RUNNING, RunStatus, age_s, read_status

if TYPE_CHECKING:
    from rich.console import RenderableType

REFRESH_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Status:
    """Arguments of `muonwire status`.

    Args:
        run: folder of a run, on any of its machines.
        watch: show it anew every second until the run is over; Ctrl-C stops watching, and not the run.
        json: print JSON instead; with --watch a line a second.
        page: draw page.html in the folder from what is there now.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = Path("runs/train")
    watch: bool = False
    json: bool = False
    page: bool = False


@command(
    Status,
    name="status",
    about="Who is in a run, since when, and who waits for whom: of a run that lasts, is over or died, from its folder.",
    examples=(
        "muonwire status runs/muon",
        "muonwire status runs/muon --watch",
        "muonwire status runs/muon --json | jq .wait_s",
        "muonwire status runs/muon --page",
    ),
)
def main(options: Status) -> int:
    """Show the state of a run; returns the exit code."""
    status = read_status(options.run)
    if options.page:
        print(f"page: {write_page(options.run)}")
    elif options.json:
        print(as_json(status, indent=None if options.watch else 1), flush=True)
        while options.watch and not status.is_over:
            time.sleep(REFRESH_S)
            status = read_status(options.run)
            print(as_json(status, indent=None), flush=True)
    else:
        _show(options, status)
    return 0


def as_json(status: RunStatus, *, indent: int | None) -> str:
    """The status as JSON, with the seconds since it was written."""
    return json.dumps({**asdict(status), "age_s": round(age_s(status), 3)}, indent=indent)


def _show(options: Status, status: RunStatus) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not options.watch or status.is_over:
        console.print(screen(status))
        return
    with Live(screen(status), console=console, refresh_per_second=4) as live:
        while not status.is_over:
            time.sleep(REFRESH_S)
            status = read_status(options.run)
            live.update(screen(status))


def screen(status: RunStatus, *, now_s: float | None = None) -> "RenderableType":
    """What the terminal shows.

    Args:
        status: of the run.
        now_s: Unix time. Default: now.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    now_s = time.time() if now_s is None else now_s
    lasts = status.state in (RUNNING, ELSEWHERE)

    def ago(time_s: float) -> str:
        return f"{_seconds(max(now_s - time_s, 0.0))} ago"

    parts: list[RenderableType] = [Text(_headline(status, ago(status.written_s)), style="bold")]
    if status.waiting:
        parts.append(Text(status.waiting, style="yellow"))
    if status.error:
        parts.append(Text(status.error, style="red"))
    replicas = Table("replica", "in since", "waited for", box=None, padding=(0, 3, 0, 0))
    for number, (name, since_s) in enumerate(status.members.items()):
        waited = status.wait_s.get(name)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since_s))
        replicas.add_row(
            Text(f"{name} (this one)" if number == status.rank else name),
            f"{since} ({ago(since_s)})" if lasts else since,
            "–" if waited is None else _seconds(waited),
        )
    for name in status.wait_s:
        if name not in status.members:
            replicas.add_row(Text(name), "not in", _seconds(status.wait_s[name]))
    facts = Table.grid(padding=(0, 3, 0, 0))
    if status.synchronized_s is not None:
        last = f"step {status.synchronized_step}, {ago(status.synchronized_s)}"
        facts.add_row("last synchronization", f"{last}; {status.synchronizations:,} in all")
    else:
        facts.add_row("last synchronization", "none yet")
    facts.add_row("sent, received", f"{_bytes(status.sent_bytes)}, {_bytes(status.received_bytes)}")
    facts.add_row("joined, left", f"{status.joins}, {status.leaves}")
    refused = ", ".join(f"{count:,} {kind}" for kind, count in status.rejected.items())
    facts.add_row("messages refused", Text(refused or "none"))
    step = status.checkpoint_step
    facts.add_row("last checkpoint", "none" if step is None else f"step {step}")
    return Group(*parts, "", replicas, "", facts)


# The page kit has more of these, and needs packages that this command does without.
def _seconds(seconds: float) -> str:
    """
    >>> _seconds(0.26), _seconds(75.0), _seconds(5400.0), _seconds(300000.0)
    ('0.3 s', '75.0 s', '90.0 min', '83.3 h')
    """
    for limit, per, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < limit:
            return f"{seconds / per:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _bytes(num_bytes: float) -> str:
    """
    >>> _bytes(12), _bytes(1234567)
    ('12 B', '1.23 MB')
    """
    for per, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= per:
            return f"{num_bytes / per:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def _headline(status: RunStatus, written: str) -> str:
    where = f"step {status.step:,} of {status.steps:,}"
    how = {
        DIED: f"its process was ended from outside at {where}; the same command with --resume goes on",
        ELSEWHERE: f"{where} when it was last written; whether it still runs, only {status.host} knows",
    }.get(status.state, f"{status.state}, {where}")
    writer = f"replica {status.rank} on {status.host} (process {status.pid})"
    return f"{status.folder}: {how}\n{writer} last wrote {written}"
