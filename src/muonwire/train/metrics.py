"""Metrics of a run: one JSON object a line, and TensorBoard events beside them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

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


class MetricsWriter:
    """Appends records to ``metrics.jsonl``; on resume, drops those after the checkpoint's step first.

    Args:
        folder: of the run.
        after_step: steps that are done already; 0 starts afresh.
        tensorboard: write events too.
        enabled: False on all replicas but the first.
    """

    def __init__(self, folder: Path, *, after_step: int, tensorboard: bool, enabled: bool) -> None:
        self._file = None
        self._events = None
        if not enabled:
            return
        kept = [r for r in read_metrics(folder) if r["step"] <= after_step]
        self._file = (folder / METRICS).open("w")
        for record in kept:
            self._write(record)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=after_step + 1)

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(dict(record), allow_nan=False) + "\n")
        self._file.flush()

    def write(self, step: int, **values: float | None) -> None:
        """One record; what is not finite is written as null."""
        if self._file is None:
            return
        self._write({"step": step, **{k: finite_or_none(v) for k, v in values.items()}})
        if self._events is not None:
            for key, value in values.items():
                if value is not None:
                    self._events.add_scalar(key, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
