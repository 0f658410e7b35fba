"""What the benches share of showing their measurements: JSON, and files of charts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch


def by_input(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Measurements by the name of their input, in order."""
    blocks: dict[str, list[Any]] = {}
    for row in rows:
        blocks.setdefault(row.input, []).append(row)
    return blocks


def as_json(rows: Sequence[Any], *, setting: Mapping[str, Any], **more: Any) -> str:
    """The setting, what else is given, and the measurements, as indented JSON; a number that is not finite is null.

    Args:
        rows: measurements.
        setting: beside the version and the threads of PyTorch.
        more: goes between the setting and the measurements.
    """
    shared = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found = {"setting": {**shared, **setting}, **more, "measurements": [asdict(row) for row in rows]}
    return json.dumps(_finite(found), indent=1)


def _finite(value: Any) -> Any:
    # JSON has no NaN.
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_panels(panels: Sequence[Any], path: Path, **properties: Any) -> None:
    """Altair charts side by side, three in a row, as a .png, .svg or self-contained .html file."""
    import altair as alt

    path.parent.mkdir(parents=True, exist_ok=True)
    chart = alt.concat(*panels, columns=3).properties(**properties)
    chart.save(str(path), **({"inline": True} if path.suffix == ".html" else {}))
