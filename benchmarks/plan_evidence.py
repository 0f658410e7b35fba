"""Collects what `muonwire plan` knows of recipes' losses: src/muonwire/plan/evidence.json, out of the kept comparisons.

    python benchmarks/plan_evidence.py

A row is one recipe in one comparison, at its best rate. Its cost is its mean loss over dense Muon's of the same work, less one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src" / "muonwire" / "plan" / "evidence.json"
REFERENCE = "muon"
BIBLE = "the King James text"
# By file: the text that was learnt, and the file whose dense Muon did the same work, if it is another one.
SOURCES: dict[str, tuple[str, str | None]] = {
    "evidence/frontier.json": (BIBLE, None),
    "evidence/peers.json": (BIBLE, "evidence/frontier.json"),
    "evidence/demo/summary.json": (BIBLE, None),
    "evidence/robustness/replicas2.json": (BIBLE, None),
    "evidence/robustness/replicas8.json": (BIBLE, None),
    "evidence/robustness/own_text.json": ("parts of the King James text, one a replica", None),
    "evidence/robustness/python.json": ("the sources of Python's standard library", None),
}
SAME_WORK = ("replicas", "steps", "num_parameters")


def losses(entries: Sequence[dict[str, Any]]) -> list[float]:
    return [e["final_eval_loss"] for e in entries]


def rows_of(file: str, task: str, reference: str | None) -> list[dict[str, Any]]:
    summary = json.loads((ROOT / file).read_text())
    theirs = json.loads((ROOT / reference).read_text()) if reference else summary
    dense = [e for e in theirs if e["recipe"] == REFERENCE]
    rows = []
    for recipe in dict.fromkeys(e["recipe"] for e in summary):
        numbered = [(i, e) for i, e in enumerate(summary) if e["recipe"] == recipe]
        entries = [e for _, e in numbered]
        first = entries[0]
        if any(first[key] != dense[0][key] for key in SAME_WORK):
            raise SystemExit(f"{file}: {recipe} and dense Muon did not do the same work")
        if None in losses(entries):
            continue
        mean = fmean(losses(dense))
        seeds = len(entries)
        rows.append(
            {
                "file": file,
                "entries": [i for i, _ in numbered],
                "recipe": recipe,
                "task": task,
                **{key: first[key] for key in SAME_WORK},
                "seeds": seeds,
                "lr": first["lr"],
                "cost": fmean(losses(entries)) / mean - 1,
                "spread": (max(losses(entries)) - min(losses(entries))) / 2 / mean if seeds > 1 else None,
            }
        )
    return rows


def collect() -> list[dict[str, Any]]:
    """All rows, in the order of the files and of the recipes in them."""
    return [row for file, (task, reference) in SOURCES.items() for row in rows_of(file, task, reference)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    made = "benchmarks/plan_evidence.py, from the files that the rows name"
    rows = ",\n".join(f"  {json.dumps(row)}" for row in collect())
    out.write_text(f'{{"made_by": {json.dumps(made)}, "reference": "{REFERENCE}", "rows": [\n{rows}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
