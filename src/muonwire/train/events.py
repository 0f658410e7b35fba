"""What happens to the replicas of a run, as one host sees it: events.jsonl for the past, status.json for now.

Both lie in the folder of every host. ``events.jsonl`` has one JSON object a line, with "time_s" (Unix time), "step" and "event":

    start, resume   "steps" wanted, "members" (names by rank), "rank", "host", "pid"
    members         who is in changed: "members", "joined", "left", "epoch", "seconds" that the change took
    synchronized    "count" of synchronizations since the last such line, "sent_bytes", "received_bytes", "seconds" of waiting in
                    them, "overlap_s" of them in which the replica went on, "up_mbit_s" and "down_mbit_s" over both together
    waited          for "peer", "seconds"
    interval        "interval", H, from the step after this one on, with "wait_us" and "step_us" that it follows from
    checkpoint      written
    rejected        "kinds" of messages that were refused since the last such line, with their numbers
    end             "outcome": "finished", "stopped", "diverged" or "failed", then with "error"
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from muonwire.errors import StoppedError
from muonwire.train.metrics import read_lines
from muonwire.transport import Traffic, Transport

EVENTS = "events.jsonl"
STATUS = "status.json"
FORMAT = 1
# The most often that status.json is written and synchronizations get a line.
EVERY_S = 1.0


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a host's events."""
    return [e for e in read_lines(folder / EVENTS) if isinstance(e, dict) and "event" in e and "time_s" in e]


def process_start(pid: int) -> int | None:
    """When a process of this machine began, in ticks since the machine did; None where it is gone or the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


class Events:
    """Writes a host's events and status; a context, whose end is the run's.

    It keeps nothing that the training needs: a run goes on where the disk is full, and says so once.

    Args:
        folder: of the host.
        transport: of the replica that writes.
        steps: of the run.
        step: done already.
        enabled: False on all replicas of a host but one; nothing is written then. Default: True.

    Attributes:
        token: stands in the status, and in that of no other run or start.
    """

    def __init__(
        self, folder: Path, transport: Transport, *, steps: int, step: int = 0, enabled: bool = True
    ) -> None:
        self.folder = folder
        self.transport = transport
        self.enabled = enabled
        self._step = step
        self._outcome = "stopped"
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._complained = False
        self._written_s = 0.0
        self._line_s = 0.0
        now_s = time.time()
        self._members = tuple(transport.members)
        self._since_s = dict.fromkeys(self._members, now_s)
        self._rejected = dict(transport.meter.rejected)
        self._update = Traffic()
        self._pending = Traffic()
        self._pending_count = 0
        pid = os.getpid()
        self.token = uuid.uuid4().hex
        self._status: dict[str, Any] = {
            "format": FORMAT,
            "token": self.token,
            "host": socket.gethostname(),
            "pid": pid,
            "process_start": process_start(pid),
            "rank": transport.everyone.rank,
            "started_s": now_s,
            "first_step": step,
            "steps": steps,
            "outcome": None,
            "error": None,
            "waiting": None,
            "synchronized": None,
            "synchronizations": 0,
            "joins": 0,
            "leaves": 0,
        }

    def __enter__(self) -> "Events":
        self._update = self.transport.meter.by_purpose.get("update", Traffic())
        about = {key: self._status[key] for key in ("steps", "rank", "host", "pid")}
        event = "resume" if self._step else "start"
        self.add(event, step=self._step, **about, members=list(self._members))
        self._write_status(time.time())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = error is not None and not isinstance(error, StoppedError)
        if error is not None:
            self._outcome = "failed" if failed else "stopped"
        if failed:
            self._status["error"] = f"{type(error).__name__}: {error}"
        self._status["outcome"] = self._outcome
        self._flush()
        end = {"outcome": self._outcome, **({"error": self._status["error"]} if failed else {})}
        self.add("end", step=self._step, **end)
        self._status["waiting"] = None
        self._write_status(time.time())
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, event: str, *, step: int, **values: Any) -> None:
        """Append an event.

        Args:
            event: its kind.
            step: done.
            values: what JSON can hold.
        """
        if not self.enabled:
            return
        line = json.dumps({"time_s": round(time.time(), 3), "step": step, "event": event, **values})
        with self._lock:
            try:
                if self._file is None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    self._file = (self.folder / EVENTS).open("a")
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                self._complain(error)

    def stepped(self, step: int) -> None:
        """Look at the transport after an optimizer step: synchronizations, members, long waits, refused messages."""
        self._step = step
        if not self.enabled:
            return
        meter, now_s = self.transport.meter, time.time()
        update = meter.by_purpose.get("update", Traffic())
        if update.num_messages != self._update.num_messages:
            self._pending += update - self._update
            self._pending_count += 1
            self._status["synchronizations"] += 1
            self._status["synchronized"] = {"step": step, "time_s": now_s}
        self._update = update
        if self.transport.members != self._members:
            self.members()
        if now_s - self._line_s >= EVERY_S:
            self._flush()
            self._line_s = now_s
        if now_s - self._written_s >= EVERY_S:
            self._write_status(now_s)

    def members(self, *, epoch: int | None = None, seconds: float | None = None) -> None:
        """Note who is in now, by ``transport.members``; nothing where it is who was.

        Args:
            epoch: number of the change. Default: none is written.
            seconds: that it took. Default: none is written.
        """
        before, now = self._members, tuple(self.transport.members)
        joined, left = [n for n in now if n not in before], [n for n in before if n not in now]
        self._members = now
        if not joined and not left:
            return
        now_s = time.time()
        self._since_s = {name: self._since_s.get(name, now_s) for name in now}
        self._status["joins"] += len(joined)
        self._status["leaves"] += len(left)
        extra = {"epoch": epoch, "seconds": seconds}
        given = {key: value for key, value in extra.items() if value is not None}
        self.add("members", step=self._step, members=list(now), joined=joined, left=left, **given)

    def waiting(self, text: str) -> None:
        """Show in the status for whom the replica waits; "" for nobody. A watcher's thread may call it."""
        self._status["waiting"] = text or None
        if self.enabled:
            self._write_status(time.time())

    def end(self, outcome: str) -> None:
        """What the run comes to: "finished", "stopped" (unless it is said, this) or "diverged"."""
        self._outcome = outcome

    def _flush(self) -> None:
        """Write the lines that were held back."""
        if self._pending_count:
            self.add(
                "synchronized",
                step=self._step,
                count=self._pending_count,
                sent_bytes=self._pending.egress_bytes,
                received_bytes=self._pending.received_bytes,
                seconds=round(self._pending.wait_s, 6),
                **self._rates(),
            )
            self._pending, self._pending_count = Traffic(), 0
        long = self.transport.waits.long
        while long:
            wait = long.popleft()
            peer = wait.peer or wait.text()
            self.add("waited", step=self._step, peer=peer, seconds=round(wait.seconds or 0.0, 3))
        rejected = dict(self.transport.meter.rejected)
        new = {kind: count - self._rejected.get(kind, 0) for kind, count in rejected.items()}
        if any(new.values()):
            kinds = {kind: count for kind, count in new.items() if count}
            self.add("rejected", step=self._step, kinds=kinds)
        self._rejected = rejected

    def _rates(self) -> dict[str, float]:
        pending = self._pending
        seconds = pending.wait_s + pending.overlap_s
        rates = {"overlap_s": round(pending.overlap_s, 6)}
        if seconds > 0:
            rates["up_mbit_s"] = round(8e-6 * pending.egress_bytes / seconds, 3)
            rates["down_mbit_s"] = round(8e-6 * pending.received_bytes / seconds, 3)
        return rates

    def _write_status(self, now_s: float) -> None:
        if not self.enabled:
            return
        meter = self.transport.meter
        total, wait_s, current = meter.total, dict(meter.wait_s), self.transport.waits.current
        if current is not None and current.peer:
            # Counted when it is over; who reads this wants to know now.
            wait_s[current.peer] = wait_s.get(current.peer, 0.0) + time.perf_counter() - current.began_s
        with self._lock:
            self._written_s = now_s
            record = {
                **self._status,
                "written_s": now_s,
                "step": self._step,
                "members": dict(self._since_s),
                "sent_bytes": total.egress_bytes,
                "received_bytes": total.received_bytes,
                "wait_s": wait_s,
                "overlap_s": dict(meter.overlap_s),
                "rejected": dict(meter.rejected),
            }
            path = self.folder / STATUS
            partial = path.with_name(path.name + ".partial")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial.write_text(json.dumps(record, indent=1) + "\n")
                partial.replace(path)
            except OSError as error:
                self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            print(f"train: {self.folder} cannot take events ({error}); the run goes on", flush=True)
