"""Collects what `muonwire plan` knows of recipes' losses: src/muonwire/plan/evidence.json, out of the kept comparisons.

    python -m benchmarks.plan_evidence

A row is one recipe in one comparison, at its best rate. Its cost is its mean loss over dense Muon's of the same work, less one. The
rows "beside" are of options that were run beside the same recipe without them: fragments and delay, and means by owners. "trends"
are what the law of the grid of evidence says of larger models and longer runs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
from benchmarks.scale.law import SIZE, STEPS, fit, points_of

from muonwire.plan.evidence import plain_of

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "src" / "muonwire" / "plan" / "evidence.json"
REFERENCE = "muon"
BIBLE = "the King James text"
# The grid of replicas: what was learnt, by the name of data that all replicas draw from, and what recipes are named here.
GRID = ROOT / "evidence" / "scale"
PYTHON = "the sources of Python's standard library"
TASKS_OF_GRID = {"kjv": BIBLE, "python": PYTHON, "dictionary": "a dictionary"}
BATCH = 8
NAMES_OF_GRID = {"one_bit_muon(interval=11)": "one_bit_muon"}
# By file: the text that was learnt, and the file whose dense Muon did the same work, if it is another one.
SOURCES: dict[str, tuple[str, str | None]] = {
    "evidence/frontier.json": (BIBLE, None),
    "evidence/peers.json": (BIBLE, "evidence/frontier.json"),
    "evidence/demo/summary.json": (BIBLE, None),
    "evidence/robustness/replicas2.json": (BIBLE, None),
    "evidence/robustness/replicas8.json": (BIBLE, None),
    "evidence/robustness/own_text.json": ("parts of the King James text, one a replica", None),
    "evidence/robustness/python.json": (PYTHON, None),
}
SAME_WORK = ("replicas", "steps", "num_parameters")
# Of runs beside the same recipe without some options: all that are there of them.
STREAMING = ROOT / "evidence" / "streaming"
OWNERS = ROOT / "evidence" / "owners" / "loss.json"


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


def grid_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of the parts of benchmarks/scale, of each setting in which dense Muon was run, at the first seed's best rate."""
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        for index, run in enumerate(pl.read_parquet(path).to_dicts()):
            recipe = NAMES_OF_GRID.get(run["recipe"], run["recipe"])
            # A row does not tell the batch, so that all have the usual one.
            if run["data"] in TASKS_OF_GRID and run["batch"] == BATCH and run["loss"] is not None:
                # Parts share runs; the first file that has one is named.
                run |= {"recipe": recipe, "file": str(path.relative_to(ROOT)), "index": index}
                cells.setdefault((run["setting"], recipe), {}).setdefault(run["config"], run)
    best = {key: at_best_rate(list(runs.values())) for key, runs in cells.items()}
    rows = []
    for (setting, recipe), runs in best.items():
        dense = best.get((setting, REFERENCE), {})
        pairs = [(run["loss"], dense[seed]["loss"]) for seed, run in runs.items() if seed in dense]
        if not pairs:
            continue
        found = [run["loss"] for run in runs.values()]
        first = next(iter(runs.values()))
        rows.append(
            {
                "file": first["file"],
                "entries": [run["index"] for run in runs.values() if run["file"] == first["file"]],
                "recipe": recipe,
                "task": TASKS_OF_GRID[first["data"]],
                **{key: first[key] for key in SAME_WORK},
                "seeds": len(runs),
                "lr": first["lr"],
                "cost": fmean(own / theirs - 1 for own, theirs in pairs),
                "spread": (max(found) - min(found)) / 2 / pairs[0][1] if len(found) > 1 else None,
            }
        )
    return rows


def at_best_rate(runs: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By seed, the runs at the rate that is best with the first seed."""
    seed = min(run["seed"] for run in runs)
    best = min((run for run in runs if run["seed"] == seed), key=lambda run: run["loss"])
    return {run["seed"]: run for run in runs if run["lr"] == best["lr"]}


def collect() -> list[dict[str, Any]]:
    """All rows, in the order of the files and of the recipes in them."""
    kept = [row for file, (task, reference) in SOURCES.items() for row in rows_of(file, task, reference)]

    def work(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["recipe"], row["task"], *(row[key] for key in SAME_WORK)

    known = {work(row) for row in kept}
    return kept + [row for row in grid_rows(GRID) if work(row) not in known]


def place(path: Path, index: int) -> str:
    """Where a run stands, as rows name it."""
    return f"{path.relative_to(ROOT)}[{index}]"


def beside_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe with options whose runs have the seeds of runs without them.

    Args:
        runs: with "recipe", "seed", "final_eval_loss", "source" and those of SAME_WORK; one a recipe and seed.
    """
    losses_of: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if run["final_eval_loss"] is not None:
            losses_of.setdefault(run["recipe"], {})[run["seed"]] = run
    rows = []
    for recipe, by_seed in losses_of.items():
        plain = plain_of(recipe)
        base = losses_of.get(plain, {})
        pairs = [(base[seed], run) for seed, run in sorted(by_seed.items()) if seed in base]
        if recipe == plain or not pairs:
            continue
        if any(one[key] != other[key] for one, other in pairs for key in SAME_WORK):
            raise SystemExit(f"{recipe} and {plain} did not do the same work")
        costs = [run["final_eval_loss"] / one["final_eval_loss"] - 1 for one, run in pairs]
        rows.append(
            {
                "recipe": recipe,
                "plain": plain,
                "sources": [run["source"] for _, run in pairs],
                **{key: pairs[0][1][key] for key in SAME_WORK},
                "seeds": len(pairs),
                "cost": fmean(costs),
                "spread": (max(costs) - min(costs)) / 2 if len(pairs) > 1 else None,
            }
        )
    return rows


def streaming_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of the text task in the files that benchmarks/streaming.py has written."""
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.get("settings", {}).get("task") != "text":
            continue
        work = {key: record["settings"][key] for key in SAME_WORK if key in record["settings"]}
        found += [{**run, **work, "source": place(path, i)} for i, run in enumerate(record.get("runs", []))]
    return found


def collect_beside() -> list[dict[str, Any]]:
    """All rows of options beside the same recipe without them."""
    owners = json.loads(OWNERS.read_text()) if OWNERS.exists() else []
    runs = [{**run, "source": place(OWNERS, i)} for i, run in enumerate(owners)]
    return beside_rows(streaming_runs(STREAMING)) + beside_rows(runs)


def collect_trends() -> list[dict[str, Any]]:
    """What the law of the grid says of size and length: of each, by how much twice as many moves the cost."""
    points = list(points_of(GRID))
    law = fit(points)
    if law is None:
        return []
    # Short runs are told by how rarely they synchronize.
    terms = {
        "four times the parameters": ("num_parameters", SIZE, [p.size for p in points]),
        "four times the steps": ("steps", STEPS, [max(p.steps, STEPS) for p in points]),
    }
    return [
        {
            "of": terms[term.name][0],
            "recipe": "one_bit_muon",
            "per_doubling": term.percent / 100 / 2,
            "error": term.error / 100 / 2,
            "base": terms[term.name][1],
            "low": min(terms[term.name][2]),
            "high": max(terms[term.name][2]),
        }
        for term in law.terms
        if term.name in terms
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    made = "python -m benchmarks.plan_evidence, from the files that the rows name"
    rows, beside, trends = (
        ",\n".join(f"  {json.dumps(row)}" for row in found)
        for found in (collect(), collect_beside(), collect_trends())
    )
    head = f'{{"made_by": {json.dumps(made)}, "reference": "{REFERENCE}"'
    out.write_text(f'{head}, "rows": [\n{rows}\n], "beside": [\n{beside}\n], "trends": [\n{trends}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
