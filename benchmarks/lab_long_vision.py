"""The lab's claims about training on images, again after 1500 steps in place of 150.

    python -m benchmarks.lab_long_vision
    python -m benchmarks.lab_long_vision --claims vit.6 vit.7 --seeds 2

Each method's rates are sought anew at this length, five a method, with the seed that the lab seeks them with; a run takes minutes
on a core. Runs that seek a rate and claims that are measured are kept, so that the same command goes on. What the claims' own
checks say is written beside the lab's verdicts to evidence/lab_long/vision.json as each claim is done.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab_long import KEPT, LAB, STEPS, against_the_lab, lines

from muonwire.lab import Claim, Setting
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.engine.check import Row
from muonwire.lab.inputs import vision_training
from muonwire.train.checkpoint import write_json

# Of those of this note, the ones that look at whole runs.
CLAIMS = ("vit.3", "vit.4", "vit.5", "vit.6", "vit.7", "vit.8")


def measured(claim: Claim, folder: Path, *, seed: int, quick: bool) -> list[Row]:
    """The claim's rows of one seed, measured unless they are there."""
    path = folder / "rows" / f"{claim.id}-{seed}.json"
    if not path.exists():
        for one in claim.inputs:
            one.prepare(folder, quick=quick)
        setting = Setting(seed=seed, quick=quick, folder=folder, inputs=claim.inputs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, [{"seed": seed, **row} for row in claim.measure(setting)])
    kept: list[Row] = json.loads(path.read_text())
    return kept


def table(kept: Path) -> str:
    """Of what is kept, in Markdown."""
    made = json.loads(kept.read_text())
    text: str = lines(made["claims"], made["steps"])
    return text


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab_long_vision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=CLAIMS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3, help="so many; default: 3")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab_long/vision"), help="folder of the runs")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of what is kept")
    parser.add_argument("--quick", action="store_true", help="two steps of small models, to try it")
    return parser.parse_args(args)


def main() -> int:
    """Returns the exit code."""
    options = parsed(sys.argv[1:])
    # Before the claims are imported, which take it from there.
    vision_training.STEPS = options.steps
    known, short = load_claims(), json.loads(LAB.read_text())
    kept = options.kept / "vision.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    # Those of other claims stay.
    claims: dict[str, Any] = before["claims"] if before.get("steps") == options.steps else {}
    folder = options.runs / ("quick" if options.quick else str(options.steps))
    for name in options.claims:
        rows = [
            row
            for seed in range(options.seeds)
            for row in measured(known[name], folder, seed=seed, quick=options.quick)
        ]
        claims[name] = against_the_lab(known[name], rows, short)
        options.kept.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"steps": options.steps, "claims": claims})
        print(
            f"{name}: {claims[name]['verdict']}, in the lab {claims[name]['verdict_in_the_lab']}", flush=True
        )
    return 0


if __name__ == "__main__" and (code := main()):
    sys.exit(code)
