"""Metrics of a run: one JSON object a line, and TensorBoard events beside them."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from muonwire.transport import Transport

METRICS = "metrics.jsonl"


def finite_or_none(value: float | None) -> float | None:
    """``value``, or None where it is not finite, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics; see ``read_lines``."""
    return read_lines(folder / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a file of JSON objects, none without a file; what a killed run left half written is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


@contextmanager
def metrics_writer(
    folder: Path, *, after_step: int, tensorboard: bool, enabled: bool, transport: Transport | None = None
) -> Iterator[Callable[..., None]]:
    """Appends records to ``metrics.jsonl``; on resume, drops those after the checkpoint's step first.

    What it yields is called with a step and its values by name; what is not finite is written as null.

    Args:
        folder: of the run.
        after_step: steps that are done already; 0 starts afresh.
        tensorboard: write events too.
        enabled: False on all replicas but the first.
        transport: of whose replicas the events tell too: how many are in, the seconds of waiting for each and those that overlapped
            with this one's own work, and as texts who joined and left; once a second and with each evaluation. Default: none.
    """
    if not enabled:
        yield lambda step, **values: None
        return
    kept = [r for r in read_metrics(folder) if r["step"] <= after_step]
    with ExitStack() as opened:
        file = opened.enter_context((folder / METRICS).open("w"))
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in kept)
        # A run that is killed in its next step keeps what it had.
        file.flush()
        events = None
        members = () if transport is None else tuple(transport.members)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            path = str(folder / "tensorboard")
            events = opened.enter_context(SummaryWriter(path, purge_step=after_step + 1))

        told_s = 0.0

        def write_replicas(events: Any, transport: Transport, step: int, *, due: bool) -> None:
            nonlocal members, told_s
            now, meter = tuple(transport.members), transport.meter
            changes = [f"{name} joined" for name in now if name not in members]
            changes += [f"{name} left" for name in members if name not in now]
            # Once a second: they grow slowly, and there may be many of them.
            if not (due or changes or time.monotonic() - told_s >= 1.0):
                return
            events.add_scalar("replicas/in", len(now), step)
            events.add_scalar("replicas/egress_bytes", meter.total.egress_bytes, step)
            events.add_scalar("replicas/received_bytes", meter.total.received_bytes, step)
            for name, seconds in meter.wait_s.items():
                events.add_scalar(f"wait_s/{name}", seconds, step)
            for name, seconds in meter.overlap_s.items():
                events.add_scalar(f"overlap_s/{name}", seconds, step)
            if changes:
                events.add_text("replicas/changes", "; ".join(changes), step)
            members, told_s = now, time.monotonic()

        def write(step: int, **values: float | None) -> None:
            record = {"step": step, **{k: finite_or_none(v) for k, v in values.items()}}
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            for key, value in values.items():
                if events is not None and value is not None:
                    events.add_scalar(key, value, step)
            if events is not None and transport is not None:
                write_replicas(events, transport, step, due="eval_loss" in values)

        yield write
