"""The state of a run, live or over, out of the folder of any of its hosts."""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonwire.errors import UsageError
from muonwire.train.events import FORMAT, STATUS, process_start, read_events

# Whether the replica that writes a status still runs.
RUNNING, DIED, ELSEWHERE = "running", "died", "unknown"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What a host's folder says of its run. Times are Unix seconds; bytes and waits count from the start of the process.

    Args:
        folder: that was read.
        state: "finished", "stopped", "diverged", "failed"; "running"; "died": its process is gone and wrote no end; "unknown": it
            runs on another machine, or did.
        error: of a run that failed.
        host, pid, rank: of the replica that writes.
        written_s: when it last wrote.
        started_s: when its process began.
        first_step, step, steps: where that began, where it is, and how many are wanted.
        members: since when each replica is in, by name.
        waiting: for whom it waits now, in words; None: for nobody.
        synchronized_step, synchronized_s: the last synchronization; None before the first.
        synchronizations: how many there were.
        sent_bytes, received_bytes: that left and reached this replica.
        wait_s: seconds of waiting for each replica.
        overlap_s: seconds for which messages of each replica travelled while this one went on.
        rejected: refused messages, by kind.
        joins, leaves: of replicas, in all of the folder's events.
        checkpoint_step: the newest checkpoint; None without one.
    """

    folder: str
    state: str
    error: str | None
    host: str
    pid: int
    rank: int
    written_s: float
    started_s: float
    first_step: int
    step: int
    steps: int
    members: dict[str, float]
    waiting: str | None
    synchronized_step: int | None
    synchronized_s: float | None
    synchronizations: int
    sent_bytes: int
    received_bytes: int
    wait_s: dict[str, float]
    overlap_s: dict[str, float]
    rejected: dict[str, int]
    joins: int
    leaves: int
    checkpoint_step: int | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will be written by that process."""
        return self.state not in (RUNNING, ELSEWHERE)


def read_status(folder: Path) -> RunStatus:
    """The state of the run in ``folder``.

    Args:
        folder: of one of its hosts; those other than the first have no metrics.

    Raises:
        UsageError: it is no run's folder, or what is there cannot be read.
    """
    record = _record(folder)
    events = read_events(folder)
    changes = [event for event in events if event["event"] == "members"]
    checkpoints = [int(event["step"]) for event in events if event["event"] == "checkpoint"]
    try:
        synchronized = record["synchronized"] or {}
        state = _state(record)
        return RunStatus(
            folder=str(folder),
            state=state,
            waiting=record["waiting"] if state == RUNNING else None,
            synchronized_step=synchronized.get("step"),
            synchronized_s=synchronized.get("time_s"),
            joins=sum(len(change.get("joined", ())) for change in changes),
            leaves=sum(len(change.get("left", ())) for change in changes),
            checkpoint_step=max(checkpoints, default=None),
            # A run that began before this was counted has none.
            overlap_s=record.get("overlap_s", {}),
            **{key: record[key] for key in _COPIED},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"status: {folder / STATUS} is damaged ({type(error).__name__}: {error}); a run that lasts writes it anew"
        ) from error


_COPIED = (
    *("error", "host", "pid", "rank", "written_s", "started_s", "first_step", "step", "steps", "members"),
    *("synchronizations", "sent_bytes", "received_bytes", "wait_s", "rejected"),
)


def _record(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UsageError(f"status: {folder} is not a folder; give the --out of a run, on any of its machines")
    path = folder / STATUS
    if not path.exists():
        runs = sorted(p.parent.name for p in folder.glob(f"*/{STATUS}"))
        remedy = f"there are runs in it: {', '.join(runs[:8])}" if runs else "give the --out of one"
        raise UsageError(
            f"status: {folder} has no {STATUS}, which every run of `muonwire train` writes when it begins; {remedy}"
        )
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"status: {path} cannot be read ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise UsageError(
            f"status: {path} has format {found!r}, this version reads {FORMAT}; use the version that runs it"
        )
    return record


def _state(record: dict[str, Any]) -> str:
    if record["outcome"] is not None:
        return str(record["outcome"])
    if record["host"] != socket.gethostname():
        return ELSEWHERE
    if record["process_start"] is not None:
        return RUNNING if process_start(record["pid"]) == record["process_start"] else DIED
    try:
        # Signal 0 is not sent; it asks whether the process is there.
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return DIED
    except PermissionError:
        pass
    return RUNNING


def age_s(status: RunStatus, *, now_s: float | None = None) -> float:
    """Seconds since it was last written."""
    return max(0.0, (time.time() if now_s is None else now_s) - status.written_s)
