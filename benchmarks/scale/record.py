"""The kept runs of the grid: one Parquet file a part, a row a run."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from benchmarks.scale.plan import Setting, made_of
from benchmarks.scale.products import are_wide

from muonwire import __version__
from muonwire.compare.comparison import machine
from muonwire.compare.config import Comparison
from muonwire.compare.runs import Result, Run, find_result

COLUMNS: dict[str, Any] = {
    "setting": pl.String,
    "x": pl.String,
    "replicas": pl.Int64,
    "batch": pl.Int64,
    "planned_steps": pl.Int64,
    "data": pl.String,
    "size": pl.String,
    "num_parameters": pl.Int64,
    "recipe": pl.String,
    "lr": pl.Float64,
    "seed": pl.Int64,
    # None where the run diverged.
    "loss": pl.Float64,
    "diverged": pl.Boolean,
    "steps": pl.Int64,
    # Per parameter and step: what a replica sent as its own message, what left it for all others, and what it received.
    "bits_sent": pl.Float64,
    "bits_egress": pl.Float64,
    "bits_received": pl.Float64,
    # Of the replicas' updates, by the probes of the run; None where it has none.
    "disagreement": pl.Float64,
    "weights_digest": pl.String,
    # What the recipe was made of.
    "chains": pl.String,
    # All that decides the outcome, as JSON.
    "config": pl.String,
    "command": pl.String,
    "versions": pl.String,
    "machine": pl.String,
    # Whether float32 products had AVX-512 on AMD's processors (--wide-products).
    "wide_products": pl.Boolean,
}


def identity(config: Comparison, run: Run) -> str:
    """All that decides the outcome of a run, as JSON; files go by their names, wherever they lie."""
    settings = config.run_config(run.recipe, run.lr, run.seed).identity()
    task = settings["task"]
    if task.get("text"):
        task["text"] = [Path(path).name for path in task["text"]]
    return json.dumps(
        {**settings, "replicas": config.replicas, "chains": made_of(run.recipe)}, sort_keys=True
    )


def row_of(setting: Setting, config: Comparison, run: Run, result: Result, *, command: str) -> dict[str, Any]:
    """The row of a finished run."""
    bits = 8 / result["num_parameters"]
    return {
        "setting": setting.name,
        "x": str(setting.x),
        "replicas": setting.replicas,
        "batch": setting.batch,
        "planned_steps": setting.steps,
        "data": setting.data,
        "size": setting.size,
        "num_parameters": result["num_parameters"],
        "recipe": run.recipe,
        "lr": run.lr,
        "seed": run.seed,
        "loss": result["final_eval_loss"],
        "diverged": result["diverged"],
        "steps": result["steps"],
        "bits_sent": bits * result["bytes_sent_per_step"],
        "bits_egress": bits * result["bytes_egress_per_step"],
        "bits_received": bits * result["bytes_received_per_step"],
        "disagreement": result.get("diagnostics", {}).get("disagreement"),
        "weights_digest": result["weights_digest"],
        "chains": made_of(run.recipe),
        "config": identity(config, run),
        "command": command,
        "versions": json.dumps(
            {"muonwire": __version__, "python": platform.python_version(), "torch": version("torch")}
        ),
        "machine": machine(),
        "wide_products": are_wide(),
    }


class Record:
    """The rows of one part, and a look-up of runs among those of all parts and the folders of runs.

    Args:
        folder: of the parts' files.
        part: whose file is written.
        writes: whether it is; a look alone leaves it as it is.
    """

    def __init__(self, folder: Path, part: str, *, writes: bool = True) -> None:
        self.path, self.writes = folder / f"{part}.parquet", writes
        self._kept: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.parquet")):
            self._kept |= {row["config"]: row for row in pl.read_parquet(path).to_dicts()}
        own = pl.read_parquet(self.path).to_dicts() if self.path.exists() else []
        self._rows = {row["config"]: row for row in own}

    def find(self, setting: Setting, config: Comparison, run: Run, *, command: str) -> dict[str, Any] | None:
        """The row of a finished run, or None; one that another part has run is this part's, too."""
        key = identity(config, run)
        if key not in self._kept:
            result = find_result(config)(run)
            if result is None:
                return None
            self._kept[key] = row_of(setting, config, run, result, command=command)
        if key not in self._rows:
            self._rows[key] = {**self._kept[key], "setting": setting.name, "x": str(setting.x)}
            self.write()
        return self._rows[key]

    def write(self) -> None:
        """Write the part's file, whole or not at all."""
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        pl.DataFrame(list(self._rows.values()), schema=COLUMNS, orient="row").write_parquet(partial)
        partial.replace(self.path)
