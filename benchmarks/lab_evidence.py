"""Keeps what a run of the lab measured: the repeats, the verdicts and the charts, without the inputs they were measured on.

`make lab` runs it: python benchmarks/lab_evidence.py runs/lab     # writes evidence/lab/ and docs/images/lab/

`muonwire lab report --out evidence/lab` makes the page again from it.
"""

import argparse
import json
import shutil
from pathlib import Path

from muonwire.lab.engine.input import ABOUT

ROOT = Path(__file__).resolve().parents[1]
# What the pages of docs/ show; the whole page has every chart.
SHOWN = (
    "conflict-1-departure",
    "coefficients-1-errors",
    "hypothesis-1-rank",
    "vit-7-methods",
    "topdown-4-effective-rank",
    "topdown-7-kept",
)


def main() -> None:
    """Copy the measurements of a lab's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the lab's output")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose evidence is replaced")
    arguments = parser.parse_args()
    out, root = arguments.out, arguments.root
    kept, images = root / "evidence" / "lab", root / "docs" / "images" / "lab"
    for folder in (kept, images):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for path in sorted(out.glob("claims/*/seed=*.json")):
        target = kept / path.relative_to(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        # One line each: indented, the rows of all claims are ten times as many lines.
        target.write_text(json.dumps(json.loads(path.read_text())) + "\n")
    for about in sorted(out.glob(f"inputs/*/{ABOUT}")):
        target = kept / about.relative_to(out)
        target.parent.mkdir(parents=True)
        shutil.copy(about, target)
    shutil.copy(out / "verdicts.json", kept / "verdicts.json")
    for name in SHOWN:
        shutil.copy(out / "images" / f"{name}.png", images)


if __name__ == "__main__":
    main()
