"""Time, memory and exactness of `muonwire spectra` on SmolLM2-135M, and what its sweep says: `make spectra`, or

python benchmarks/spectra_smollm2.py            # on a quiet machine; writes evidence/spectra/ and docs/images/spectra/

The documentation quotes what it writes. All that it makes is in runs/spectra; what the sweep there has measured is not measured
again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from muonwire.lab.engine.run import machine
from muonwire.spectra.edit import read_record
from muonwire.spectra.inputs import input_energy
from muonwire.spectra.likeness import log_probabilities, text_windows
from muonwire.spectra.measure import singular_values
from muonwire.spectra.models import PACKAGED, open_model
from muonwire.spectra.weights import weights_of
from muonwire.tasks.text import read_text

ROOT = Path(__file__).resolve().parents[1]
KEPT, IMAGES = ROOT / "evidence" / "spectra", ROOT / "docs" / "images" / "spectra"
RUNS = ROOT / "runs" / "spectra"
EDITED = "flatten(power=0.5)"


def timed(*arguments: str) -> dict[str, Any]:
    """Wall time and peak resident memory of one command."""
    command = [sys.executable, "-m", "muonwire", "spectra", *arguments]
    start_s = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    took_s = time.perf_counter() - start_s
    # Linux counts in KiB.
    return {
        "command": "muonwire spectra " + " ".join(arguments),
        "s": took_s,
        "peak_mb": usage.ru_maxrss * 1024 / 1e6,
    }


def empty_edit(copy: Path) -> dict[str, float]:
    """How far the logits of a model that was written without an edit are from the original's."""
    before, after = open_model(PACKAGED, device="cpu"), open_model(str(copy), device="cpu")
    ids = text_windows(before, read_text(()).decode(), windows=4, length=128)
    apart = [
        float((log_probabilities(before.model, i) - log_probabilities(after.model, i)).abs().max())
        for i in ids
    ]
    return {"largest_difference_of_log_probabilities": max(apart), "tokens": ids.numel()}


def inputs() -> list[dict[str, Any]]:
    """By kind of weights, the median over the layers of where their inputs lie on the King James text."""
    opened = open_model(PACKAGED, device="cpu")
    found = input_energy(opened.model, text_windows(opened, read_text(()).decode(), windows=8, length=128))
    rows: list[dict[str, Any]] = []
    for kind in dict.fromkeys(e.kind for e in found):
        its = [e for e in found if e.kind == kind]
        medians = {
            what: median(getattr(e, what) for e in its)
            for what in ("largest", "smallest", "output", "weight")
        }
        rows.append({"kind": kind, "layers": len(its), **medians})
    return rows


def read_back(folder: Path) -> dict[str, Any]:
    """The largest distance of a singular value that is read back from the wanted one, over the bound eps/2 · ‖W‖_F."""
    opened, wanted = open_model(str(folder), device="cpu"), read_record(folder)["matrices"]
    worst, count = 0.0, 0
    for weight in weights_of(opened.model):
        for name, matrix in weight.matrices():
            if name in wanted:
                asked = torch.tensor(wanted[name]["wanted"], dtype=torch.float64)
                bound = torch.finfo(matrix.dtype).eps / 2 * float(matrix.double().norm())
                worst = max(worst, float((singular_values(name, matrix) - asked).abs().max()) / bound)
                count += 1
    dtype = str(next(opened.model.parameters()).dtype)
    return {"matrices": count, "largest_over_bound": worst, "dtype": dtype}


def main() -> None:
    """Measure and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-sweep", action="store_true", help="only time, memory and exactness")
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    show = timed("show", PACKAGED, "--out", str(RUNS / "show"))
    edit = timed("edit", PACKAGED, "--edit", EDITED, "--overwrite", "--out", str(RUNS / "edited"))
    timed("edit", PACKAGED, "--overwrite", "--out", str(RUNS / "copy"))
    record = {
        "machine": machine(),
        "show": {**show, "command": f"muonwire spectra show {PACKAGED}"},
        "edit": {**edit, "command": f"muonwire spectra edit {PACKAGED} --edit '{EDITED}'"},
        "empty_edit": empty_edit(RUNS / "copy"),
        "read_back": read_back(RUNS / "edited"),
        "inputs": inputs(),
    }
    (KEPT / "smollm2.json").write_text(json.dumps(record, indent=1) + "\n")
    shutil.copy(RUNS / "show" / "matrices.parquet", KEPT / "matrices.parquet")
    if not args.skip_sweep:
        timed("sweep", PACKAGED, "--out", str(RUNS / "sweep"))
        shutil.copy(RUNS / "sweep" / "sweep.parquet", KEPT / "sweep.parquet")
        for path in sorted((RUNS / "sweep").glob("*.png")):
            shutil.copy(path, IMAGES / path.name)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
