"""The time line of a run out of its events: who was in, who was waited for, and what happened when."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

IN, WAITED = "in the run", "waited for"
JOINED, LEFT, SYNCHRONIZED = "joined", "left", "synchronized"
BEGAN, CHECKPOINT, REJECTED, ENDED = "begins", "checkpoint", "refused messages", "ends"
INTERVAL = "other interval"
# Of each kind so many marks are drawn; of waits the longest, of others at equal distances in time.
MOST = 1500
MOST_ROWS = 40
# Of synchronizations in a row, so that they can be told apart.
MOST_TICKS = 150
RUN = "run"


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of time in the row of a replica; seconds from the first event."""

    row: str
    begin_s: float
    end_s: float
    kind: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A moment in a row; ``count`` where it stands for several that lie close together."""

    row: str
    at_s: float
    kind: str
    text: str = ""
    count: int = 1


@dataclass(kw_only=True)
class Timeline:
    """What the time line shows.

    Args:
        began_s: Unix time of the first event.
        rows: replicas in the order in which they first came.
        spans: presence and waits.
        marks: joins, leaves, synchronizations, and in the row ``RUN`` what concerns all.
        notes: what was left out.
    """

    began_s: float = 0.0
    rows: list[str] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def end_s(self) -> float:
        """Seconds from the first event to the last."""
        ends = [span.end_s for span in self.spans] + [mark.at_s for mark in self.marks]
        return max(ends, default=0.0)


def timeline(events: Sequence[Mapping[str, Any]], *, until_s: float | None = None) -> Timeline:
    """Read the events of one host.

    Args:
        events: as ``read_events`` has them.
        until_s: Unix time up to which a run without an end lasts; default: its last event.
    """
    if not events:
        return Timeline()
    began_s = float(events[0]["time_s"])
    line = Timeline(began_s=began_s)
    inside: dict[str, float] = {}
    waits: list[Span] = []
    synchronized: list[tuple[float, int]] = []
    last_s, ended = 0.0, True

    def close(names: Iterable[str], at_s: float) -> None:
        for name in list(names):
            line.spans.append(Span(row=name, begin_s=inside.pop(name), end_s=at_s, kind=IN))

    def enter(names: Iterable[str], at_s: float) -> None:
        for name in names:
            inside.setdefault(name, at_s)
            if name not in line.rows:
                line.rows.append(name)

    def mark(row: str, at_s: float, kind: str, text: str = "") -> None:
        line.marks.append(Mark(row=row, at_s=at_s, kind=kind, text=text))

    for event in events:
        at_s, kind, step = float(event["time_s"]) - began_s, event["event"], event.get("step", 0)
        if kind in ("start", "resume"):
            if not ended:
                mark(RUN, last_s, ENDED, "without a word: its process was ended")
            close(inside, last_s)
            ended = False
            enter(event.get("members", ()), at_s)
            mark(RUN, at_s, BEGAN, f"{kind} after step {step}")
        elif kind == "members":
            members = event.get("members", ())
            close([name for name in inside if name not in members], at_s)
            enter(members, at_s)
            for name in event.get("joined", ()):
                mark(name, at_s, JOINED, f"{name} joined after step {step}")
            for name in event.get("left", ()):
                mark(name, at_s, LEFT, f"{name} left after step {step}")
        elif kind == "waited":
            seconds, peer = float(event["seconds"]), str(event["peer"])
            text = f"{seconds:.1f} s, step {step}"
            waits.append(Span(row=peer, begin_s=max(0.0, at_s - seconds), end_s=at_s, kind=WAITED, text=text))
        elif kind == "synchronized":
            synchronized.append((at_s, int(event.get("count", 1))))
        elif kind == "checkpoint":
            mark(RUN, at_s, CHECKPOINT, f"after step {step}")
        elif kind == "interval":
            mark(RUN, at_s, INTERVAL, f"H is {event['interval']} after step {step}")
        elif kind == "rejected":
            kinds = event.get("kinds", {})
            mark(RUN, at_s, REJECTED, ", ".join(f"{count} {name}" for name, count in kinds.items()))
        elif kind == "end":
            close(inside, at_s)
            ended = True
            mark(RUN, at_s, ENDED, str(event.get("error", event.get("outcome", ""))))
        last_s = at_s
    close(inside, last_s if until_s is None else max(last_s, until_s - began_s))
    _add_waits(line, waits)
    _thin(line)
    _cut_rows(line)
    _add_synchronizations(line, synchronized)
    return line


def _add_waits(line: Timeline, waits: list[Span]) -> None:
    kept = sorted(waits, key=lambda wait: wait.begin_s - wait.end_s)[:MOST]
    for wait in kept:
        if wait.row not in line.rows:
            # Not a replica's name: what was waited for before there were any.
            line.rows.append(wait.row)
    line.spans += sorted(kept, key=lambda wait: wait.begin_s)
    if len(kept) < len(waits):
        line.notes.append(
            f"Of {len(waits):,} waits of a second or more, the {MOST:,} longest are drawn; the replicas' table has all."
        )


def _thin(line: Timeline) -> None:
    """At most ``MOST`` marks of a kind."""
    for kind in (JOINED, LEFT, BEGAN, CHECKPOINT, INTERVAL, REJECTED, ENDED):
        of_kind = [mark for mark in line.marks if mark.kind == kind]
        if len(of_kind) > MOST:
            kept = {id(of_kind[i * len(of_kind) // MOST]) for i in range(MOST)}
            line.marks = [mark for mark in line.marks if mark.kind != kind or id(mark) in kept]
            line.notes.append(f"Of {len(of_kind):,} marks for {kind!r}, {MOST:,} are drawn.")
    spans = [span for span in line.spans if span.kind == IN]
    if len(spans) > MOST:
        kept_spans = {id(span) for span in sorted(spans, key=lambda s: s.begin_s - s.end_s)[:MOST]}
        line.spans = [span for span in line.spans if span.kind != IN or id(span) in kept_spans]
        line.notes.append(f"Of {len(spans):,} stretches of presence, the {MOST:,} longest are drawn.")


def _cut_rows(line: Timeline) -> None:
    """At most ``MOST_ROWS`` replicas: those that came first."""
    if len(line.rows) <= MOST_ROWS:
        return
    line.notes.append(f"Of {len(line.rows):,} replicas, the first {MOST_ROWS} have a row.")
    line.rows = line.rows[:MOST_ROWS]
    drawn = {*line.rows, RUN}
    line.spans = [span for span in line.spans if span.row in drawn]
    line.marks = [mark for mark in line.marks if mark.row in drawn]


def _add_synchronizations(line: Timeline, synchronized: Sequence[tuple[float, int]]) -> None:
    """A mark in the row of every replica that was in, for each piece of time that had any."""
    if not synchronized:
        return
    rows = {row: [s for s in line.spans if s.kind == IN and s.row == row] for row in line.rows}
    pieces = max(min(MOST // max(len(rows), 1), MOST_TICKS), 30)
    width_s = max(synchronized[-1][0], 1e-9) / pieces
    counts: dict[int, tuple[float, int]] = {}
    for at_s, count in synchronized:
        piece = int(at_s / width_s)
        counts[piece] = (at_s, counts.get(piece, (at_s, 0))[1] + count)
    for at_s, count in counts.values():
        for row, spans in rows.items():
            if any(span.begin_s <= at_s <= span.end_s for span in spans):
                text = f"{count} times" if count > 1 else "once"
                line.marks.append(Mark(row=row, at_s=at_s, kind=SYNCHRONIZED, text=text, count=count))
