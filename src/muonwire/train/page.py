"""The page of one run: loss against steps, bytes and time, and the time line of its replicas."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonwire.errors import UsageError
from muonwire.train.events import read_events
from muonwire.train.metrics import read_metrics
from muonwire.train.status import RUNNING, RunStatus, read_status
from muonwire.train.timeline import (
    BEGAN,
    CHECKPOINT,
    ENDED,
    IN,
    INTERVAL,
    JOINED,
    LEFT,
    REJECTED,
    RUN,
    SYNCHRONIZED,
    WAITED,
    Timeline,
    timeline,
)

if TYPE_CHECKING:
    from muonwire.pages import Block, Chart, Page, Table, Tiles

PAGE = "page.html"
# Training losses are drawn as means over so many stretches of equal length.
STRETCHES = 300
ROW_HEIGHT = 34

# Colours that both schemes can be read in, and the shapes of marks.
_COLOURS = {
    IN: "#7c93c9",
    WAITED: "#e07b2a",
    SYNCHRONIZED: "#1d3a8a",
    JOINED: "#2a9d8f",
    LEFT: "#c2371f",
    BEGAN: "#2a9d8f",
    CHECKPOINT: "#b06fd0",
    INTERVAL: "#4f7f3a",
    REJECTED: "#c99401",
    ENDED: "#c2371f",
}
_SHAPES = {
    JOINED: "triangle-up",
    LEFT: "triangle-down",
    BEGAN: "triangle-right",
    CHECKPOINT: "diamond",
    INTERVAL: "circle",
    REJECTED: "cross",
    ENDED: "square",
}


def write_page(folder: Path) -> Path:
    """Draw the page of a run into its folder; returns its path.

    Args:
        folder: of one of the run's hosts; without metrics the page has no losses.

    Raises:
        UsageError: the folder is no run's.
        ModuleNotFoundError: what draws pages is not installed (muonwire[report]).
    """
    from muonwire.pages import render_page

    path = folder / PAGE
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render_page(run_page(folder)))
    partial.replace(path)
    return path


def print_page(folder: Path) -> None:
    """Draw the page of a run that has ended, and say where it is, or why there is none; the run's outcome stands without it."""
    try:
        print(f"page: {write_page(folder)}", flush=True)
    except ModuleNotFoundError as error:
        print(
            f'no page: {error.name} is not installed; pip install "muonwire[report]", then muonwire status {folder} --page',
            flush=True,
        )
    except (OSError, UsageError) as error:
        print(f"no page: {error}", flush=True)


def run_page(folder: Path) -> "Page":
    """The page.

    Args:
        folder: of one of the run's hosts.

    Raises:
        UsageError: the folder is no run's.
    """
    from muonwire.pages import Page, Section

    status = read_status(folder)
    metrics, config = read_metrics(folder), _read(folder / "config.json")
    line = timeline(read_events(folder), until_s=status.written_s)
    sections: list[Section] = []
    losses = _loss_blocks(metrics, replicas=len(status.members))
    if losses:
        sections.append(Section(title="Loss", anchor="loss", blocks=losses))
    blocks: tuple[Block, ...] = (_table(status),)
    if line.rows:
        blocks = (_timeline_chart(line), *blocks)
    sections.append(Section(title="Replicas", anchor="replicas", blocks=blocks))
    recipe = str(config.get("recipe", "")) if isinstance(config, dict) else ""
    loss = next((r["eval_loss"] for r in reversed(metrics) if r.get("eval_loss") is not None), None)
    return Page(
        title=recipe or folder.resolve().name,
        kicker="muonwire train",
        lead=_lead(status, loss),
        facts=(
            f"host {status.host}, replica {status.rank}, process {status.pid}",
            f"folder {folder}",
            f"written {_moment(time.time())}",
        ),
        sections=(Section(title="At a glance", anchor="glance", blocks=(_tiles(status, loss),)), *sections),
        footer=f"Drawn by muonwire status {folder} --page.",
    )


def _lead(status: RunStatus, loss: float | None) -> str:
    where = f"step {status.step:,} of {status.steps:,}"
    how = {
        RUNNING: f"Running, at {where}",
        "finished": f"Finished, {where}",
        "failed": f"Failed in {where}: {status.error}",
        "died": f"Its process was ended from outside at {where}, without a word",
        "unknown": f"At {where} when it was last written, by {status.host}",
    }.get(status.state, f"{status.state.capitalize()} at {where}")
    if loss is None:
        return f"{how}."
    return f"{how}. Evaluation loss {loss:.4f}."


def _tiles(status: RunStatus, loss: float | None) -> "Tiles":
    from muonwire.pages import Tile, Tiles
    from muonwire.pages.units import bytes_text, count_text, loss_text, seconds_text

    waited, overlapped = sum(status.wait_s.values()), sum(status.overlap_s.values())
    meanwhile = f"; for {seconds_text(overlapped)} it went on while messages travelled" if overlapped else ""
    lasted_s = max(status.written_s - status.started_s, 1e-9)
    tiles = [
        Tile(
            label="steps",
            value=count_text(status.step),
            detail=f"of {count_text(status.steps)}, {count_text(status.step - status.first_step)} since the last start",
        ),
        Tile(label="replicas", value=count_text(len(status.members)), detail=_changes(status)),
        Tile(
            label="synchronizations",
            value=count_text(status.synchronizations),
            detail="since the last start",
        ),
        Tile(
            label="bytes sent",
            value=bytes_text(status.sent_bytes),
            detail=f"by this replica; {bytes_text(status.received_bytes)} received",
        ),
        Tile(
            label="waited",
            value=seconds_text(waited),
            detail=f"{100 * waited / lasted_s:.0f} % of {seconds_text(lasted_s)}{meanwhile}",
        ),
    ]
    if loss is not None:
        tiles.insert(0, Tile(label="evaluation loss", value=loss_text(loss), detail="of the shared weights"))
    return Tiles(tiles=tuple(tiles))


def _changes(status: RunStatus) -> str:
    if not status.joins and not status.leaves:
        return "none joined or left"
    return f"{status.joins} joined, {status.leaves} left"


def _table(status: RunStatus) -> "Table":
    from muonwire.pages import text_table
    from muonwire.pages.units import seconds_text

    names = [*status.members, *(name for name in status.wait_s if name not in status.members)]
    rows = [
        (
            f"{name} (this one)" if number == status.rank and name in status.members else name,
            _moment(status.members[name]) if name in status.members else "left",
            seconds_text(status.wait_s[name]) if name in status.wait_s else "–",
            *([seconds_text(status.overlap_s.get(name, 0.0))] if status.overlap_s else []),
        )
        for number, name in enumerate(names)
    ]
    refused = [f"Refused messages: {count:,} {kind}." for kind, count in status.rejected.items()]
    return text_table(
        "Replicas, as this host saw them since its last start",
        ["replica", "in since (UTC)", "waited for", *(["meanwhile under way"] if status.overlap_s else [])],
        rows,
        names=2,
        notes=[
            "Replicas are waited for one after the other, so each has the seconds that it adds to those before it.",
            *refused,
        ],
    )


def _loss_blocks(metrics: Sequence[Mapping[str, Any]], *, replicas: int) -> "tuple[Block, ...]":
    from muonwire.pages import Row
    from muonwire.pages.units import duration_unit

    if not any(record.get("eval_loss") is not None for record in metrics):
        return ()
    by_steps = _loss_chart(
        metrics,
        cost=lambda record: float(record["step"]),
        name="loss_by_steps",
        x_title="optimizer steps",
        how="Lower is better. The evaluation is of the weights that all replicas share; the training loss is that of the first "
        "replica's own batches, in means over stretches of steps.",
    )

    def seconds(record: Mapping[str, Any]) -> float:
        return sum(float(record.get(key) or 0.0) for key in ("compute_s", "optimizer_s", "exchange_s"))

    per, unit = duration_unit(max((seconds(record) for record in metrics), default=1.0))
    by_time = _loss_chart(
        metrics,
        cost=lambda record: seconds(record) / per,
        name="loss_by_time",
        x_title=f"time ({unit})",
        how="The seconds of the first replica in computation and exchanges, added up; evaluation is not counted.",
    )
    if replicas < 2 and not any(record.get("sent_bytes") for record in metrics):
        return (by_steps, by_time)
    most = max((float(record.get("sent_bytes") or 0) for record in metrics), default=0.0)
    scale, name = next(((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= s), (1.0, "B"))
    by_bytes = _loss_chart(
        metrics,
        cost=lambda record: float(record.get("sent_bytes") or 0) / scale,
        name="loss_by_bytes",
        x_title=f"bytes sent by a replica ({name})",
        how="Bytes are counted on the wire, headers included, each payload once.",
    )
    return by_steps, Row(charts=(by_bytes, by_time))


def _loss_chart(
    metrics: Sequence[Mapping[str, Any]], *, cost: Any, name: str, x_title: str, how: str
) -> "Chart":
    from muonwire.pages import series_chart

    evaluations = [
        {"x": cost(r), "y": float(r["eval_loss"]), "series": "evaluation"}
        for r in metrics
        if r.get("eval_loss") is not None
    ]
    own = [r for r in metrics if r.get("local_loss") is not None]
    length = max(len(own) // STRETCHES, 1)
    # Where nothing is sent between two synchronizations, several steps have one place on the axis of bytes.
    places: dict[float, list[float]] = {}
    for start in range(0, len(own), length):
        part = own[start : start + length]
        places.setdefault(cost(part[-1]), []).extend(float(r["local_loss"]) for r in part)
    means = [
        {"x": place, "y": sum(losses) / len(losses), "series": "training"} for place, losses in places.items()
    ]
    # Evaluations are drawn as points too: a line through every one of thousands is enough.
    kept = evaluations[:: max(len(evaluations) // STRETCHES, 1)]
    if evaluations and kept[-1] is not evaluations[-1]:
        kept.append(evaluations[-1])
    return series_chart(
        [*kept, *means],
        name=name,
        title=f"Loss by {name.rpartition('_')[2]}",
        how_to_read=how,
        x_title=x_title,
        y_title="loss",
        dots=False,
    )


def _timeline_chart(line: Timeline) -> "Chart":
    import altair as alt

    from muonwire.pages import Chart, KeyEntry, Swatch
    from muonwire.pages.spec import inline, spec_of
    from muonwire.pages.units import duration_unit

    per, unit = duration_unit(max(line.end_s, 1.0))
    rows = [RUN, *line.rows]
    kinds = [
        kind
        for kind in _COLOURS
        if any(s.kind == kind for s in line.spans) or any(m.kind == kind for m in line.marks)
    ]
    y = alt.Y(
        "row:N",
        sort=rows,
        title=None,
        axis=alt.Axis(grid=False, labelLimit=220),
        scale=alt.Scale(domain=rows),
    )
    # Room at both ends, so that marks there are whole.
    room = 0.02 * max(line.end_s, 1.0) / per
    x = alt.X(
        "at:Q",
        title=f"time since {_moment(line.began_s)} UTC ({unit})",
        scale=alt.Scale(domain=[-room, max(line.end_s, 1.0) / per + room], nice=False, zero=False),
    )
    colour = alt.Color(
        "kind:N",
        scale=alt.Scale(domain=kinds, range=[_COLOURS[kind] for kind in kinds]),
        legend=alt.Legend(title=None),
    )
    spans = [
        {"row": s.row, "at": s.begin_s / per, "to": s.end_s / per, "kind": s.kind, "what": s.text or s.kind}
        for s in line.spans
    ]
    marks = [{"row": m.row, "at": m.at_s / per, "kind": m.kind, "what": m.text or m.kind} for m in line.marks]
    tooltip = [alt.Tooltip(f"{name}:N", title=title) for name, title in _TIPS.items()]
    at = {"x": x, "y": y, "color": colour, "tooltip": tooltip}
    present = [span for span in spans if span["kind"] == IN]
    waits = [span for span in spans if span["kind"] == WAITED]
    ticks = [mark for mark in marks if mark["kind"] == SYNCHRONIZED]
    layers: list[Any] = [
        alt.Chart(inline(present)).mark_bar(height=14, cornerRadius=1).encode(**at, x2="to:Q"),
        alt.Chart(inline(ticks)).mark_tick(height=14, thickness=1, opacity=0.5).encode(**at),
        # The line around it keeps a short wait in sight.
        alt.Chart(inline(waits))
        .mark_bar(height=8, stroke=_COLOURS[WAITED], strokeWidth=2)
        .encode(**at, x2="to:Q"),
    ]
    shapes = [kind for kind in kinds if kind in _SHAPES]
    shape = alt.Shape(
        "kind:N",
        scale=alt.Scale(domain=shapes, range=[_SHAPES[kind] for kind in shapes]),
        legend=None,
    )
    points = [mark for mark in marks if mark["kind"] in _SHAPES]
    layers.append(
        alt.Chart(inline(points)).mark_point(filled=True, size=130, opacity=1).encode(**at, shape=shape)
    )
    return Chart(
        name="timeline",
        title="Time line",
        how_to_read="A row for each replica: a bar where it was in the run, orange where this host waited for it, a tick at "
        "synchronizations. The first row has what concerns all. Point at anything to read what it is.",
        spec=spec_of(layers, height=ROW_HEIGHT * len(rows)),
        key=tuple(KeyEntry(label=k, swatch=Swatch(colour=_COLOURS[k]), selects=False) for k in kinds),
        notes=tuple(line.notes),
    )


_TIPS = {"row": "replica", "kind": "what", "what": "more"}


def _moment(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
