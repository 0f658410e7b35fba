"""The lab's claims about training, again at 1500 steps in place of 150, and on another text.

    python -m benchmarks.lab_long --jobs 1 --limit-hours 4
    python -m benchmarks.lab_long --text python
    python -m benchmarks.lab_long --report

Runs are made in rounds, so that there is an answer however long it goes on: every recipe once, at half of the rate that was best
in the lab's 150 steps, since longer runs want lower ones; then its two neighbours; then more seeds at the best. What is stopped
goes on with the same command. Then, or with --report, the claims' own checks are made on what is there, and written beside the
verdicts of the lab to evidence/lab_long/TEXT.json.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.scale.products import widen
from benchmarks.scale.texts import TEXTS, text_path

from muonwire.compare.comparison import RESULTS, SUMMARY
from muonwire.compare.config import Comparison
from muonwire.compare.runs import Run, best_lr, find_result, outwards
from muonwire.compare.summary import curves, summarize
from muonwire.compare.virtual import Job, run_jobs
from muonwire.errors import StoppedError, UsageError
from muonwire.lab import Claim, Setting
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.engine.check import Row
from muonwire.lab.inputs.training import RECIPES, TRAINING, settings
from muonwire.train.checkpoint import write_json

STEPS = 1500
RATES = tuple(0.016 * 2.0**k for k in range(-9, 10))
# The best rates in 150 steps, as the lab's page has them; of recipes that are not here, 0.032.
BEST_SHORT = {
    "muon(adam=['mlp'])": 0.008,
    "muon(adam=['self_attn'])": 0.008,
    "adamw": 0.004,
    "sgd": 0.128,
    "sgd(momentum=0.0)": 0.256,
    "distro": 0.016,
    "distro(decay=0.0)": 0.004,
    "approach_a": 0.016,
    "approach_a(momentum=0.0)": 0.016,
    "approach_b": 0.128,
    "approach_b(server=True)": 0.064,
    "approach_b(residual_decay=0.0)": 0.064,
    "approach_b(codec='dct(chunk=64) | topk(k=1024) | float32')": 0.064,
    "approach_c": 0.064,
    "approach_c(codec='dct(chunk=64) | topk(k=1024) | float32')": 0.064,
    "approach_d": 0.064,
    "approach_e": 0.016,
    "approach_f(period=50)": 0.128,
    "ef14_muon": 0.016,
    "pre_polar": 0.064,
    "distro_weight_polar(period=10)": 0.128,
    "distro_weight_polar(period=60)": 0.128,
    "distro_weight_polar(period=60, strength=1.0)": 0.128,
    "dion(fraction=1.0)": 0.016,
}
USUAL = 0.032
KEPT = Path("evidence/lab_long")
LAB = Path("evidence/lab/verdicts.json")


def comparison(options: argparse.Namespace) -> Comparison:
    """The lab's comparison, with all that this command makes otherwise."""
    out: Path = options.runs / options.text
    text = () if options.text == "king_james" else (text_path(options.text, options.texts),)
    steps = options.steps
    return replace(
        settings(out, quick=options.quick),
        recipes=tuple(options.recipes or RECIPES),
        finalists=None,
        steps=steps,
        tune_steps=None,
        lr_grid=RATES,
        seeds=tuple(range(options.seeds)),
        text=text,
        evaluate_every=max(steps // 6, 1),
        compile=not options.quick,
    ).resolve()


def tried(config: Comparison, recipe: str, *, most: int) -> list[Run]:
    """The runs of the first seed that seek a rate."""
    begin = RATES.index(BEST_SHORT.get(recipe, USUAL)) - 1
    return outwards(
        [Run(recipe, lr, config.seeds[0]) for lr in RATES], find_result(config), begin=begin, most=most
    )


def left(config: Comparison, *, most: int) -> Iterator[Job]:
    """What is left to run by now, the next first."""
    find = find_result(config)
    for number in (1, most):
        for recipe in config.recipes:
            runs = tried(config, recipe, most=number)
            yield from (Job(config, run) for run in runs if find(run) is None)
    for seed in config.seeds[1:]:
        for recipe in config.recipes:
            best = best_lr(config, recipe, find)
            if best is not None and find(Run(recipe, best, seed)) is None:
                yield Job(config, Run(recipe, best, seed))


def train(options: argparse.Namespace, config: Comparison) -> None:
    """Do what is left."""
    find = find_result(config)

    def finish(job: Job) -> None:
        result = find(job.run)
        assert result is not None, "its result was written"
        print(f"{options.text} {job.run}: {result['final_eval_loss']}", flush=True)

    run_jobs(
        lambda: left(config, most=options.rates),
        jobs=options.jobs,
        modules=config.task.modules,
        at=lambda job, step: None,
        finish=finish,
        stopped=lambda: StoppedError("lab_long: stopped; the same command goes on"),
        limit_s=None if options.limit_hours is None else 3600 * options.limit_hours,
    )


def rows_of(claim: Claim, folder: Path, *, seeds: Sequence[int], quick: bool) -> list[Row]:
    """What the claim measures on the runs that are there; a seed that lacks one of them gives none."""
    for one in claim.inputs:
        if one is not TRAINING:
            one.prepare(folder, quick=quick)
    rows: list[Row] = []
    for seed in seeds:
        setting = Setting(seed=seed, quick=quick, folder=folder, inputs=claim.inputs)
        try:
            rows += [{"seed": seed, **row} for row in claim.measure(setting)]
        except UsageError:
            continue
    return rows


def report(config: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """The claims' checks on the runs that are there."""
    folder = options.runs / options.text / "lab"
    place = TRAINING.folder(folder, quick=options.quick)
    place.mkdir(parents=True, exist_ok=True)
    entries = summarize(config)
    write_json(place / SUMMARY, entries)
    curves(config).write_parquet(place / RESULTS)
    find = find_result(config)
    rates = {r: sum(find(Run(r, lr, config.seeds[0])) is not None for lr in RATES) for r in config.recipes}
    short = json.loads(LAB.read_text())
    claims = {}
    for claim in load_claims().values():
        if TRAINING not in claim.inputs:
            continue
        rows = rows_of(claim, folder, seeds=config.seeds, quick=options.quick)
        claims[claim.id] = against_the_lab(claim, rows, short)
    return {
        "text": options.text,
        "steps": config.steps,
        "runs": [
            {
                "recipe": e["recipe"],
                "seed": e["seed"],
                "lr": e["lr"],
                "loss": e["final_eval_loss"],
                "bits": e["bits_per_parameter_step"],
                "rates": rates[e["recipe"]],
            }
            for e in entries
        ],
        "claims": claims,
    }


def against_the_lab(claim: Claim, rows: Sequence[Row], short: Mapping[str, Any]) -> dict[str, Any]:
    """What a claim's checks make of the rows, if there are any, beside what the lab's verdicts, ``short``, have of it."""
    decision = claim.decide(rows)
    of_short = {(c["statement"], c["setting"]): c for c in short[claim.id]["checks"]}
    return {
        "verdict": decision.verdict if rows else None,
        "verdict_in_the_lab": short[claim.id]["verdict"],
        "seeds": len({row["seed"] for row in rows}),
        "answer": decision.answer if rows else "",
        "checks": [
            {
                "statement": one.check.name,
                "setting": one.check.setting,
                "state": one.state,
                "mean": None if one.interval is None else finite(one.interval.mean),
                "low": None if one.interval is None else finite(one.interval.low),
                "high": None if one.interval is None else finite(one.interval.high),
                "state_in_the_lab": of_short.get((one.check.name, one.check.setting), {}).get("state"),
                "mean_in_the_lab": of_short.get((one.check.name, one.check.setting), {}).get("mean"),
            }
            for one in decision.outcomes
            if rows
        ],
    }


def table(kept: Path) -> str:
    """Of one text in Markdown: the verdicts of the lab, those here, and the statements that came out otherwise."""
    made = json.loads(kept.read_text())
    few, most = (pick(run["rates"] for run in made["runs"]) for pick in (min, max))
    rates = f"{few} rate{'s' * (few > 1)}" if few == most else f"{few} to {most} rates"
    measured = {i: c for i, c in made["claims"].items() if c["verdict"]}
    seeds = sorted({c["seeds"] for c in measured.values()})
    return (
        f"{len({run['recipe'] for run in made['runs']})} recipes, {made['steps']} steps, {rates}, "
        f"{' to '.join(str(n) for n in seeds)} seed{'s' * (seeds != [1])}.\n\n{lines(measured, made['steps'])}"
    )


def lines(measured: Mapping[str, Any], steps: int) -> str:
    """A table in Markdown of claims that were measured."""
    text = f"| claim | the lab, 150 steps | {steps} steps | what came out otherwise |\n|---|---|---|---|\n"
    for name, claim in measured.items():
        flips = [
            f"{c['statement']} ({c['setting']}): {c['state_in_the_lab']} ({c['mean_in_the_lab']:.3g}), "
            f"now {c['state']} ({c['mean']:.3g})"
            for c in claim["checks"]
            if c["mean"] is not None and c["state_in_the_lab"] not in (None, c["state"])
        ]
        said = "; ".join(flips).replace("|", "\\|") or "–"
        place = f"[{name}](#{name.replace('.', '-').lower()})"
        row = f"{place} | {claim['verdict_in_the_lab']} | **{claim['verdict']}** | {said}"
        text += f"| {row} |\n"
    return text


def finite(value: float) -> float | None:
    """None in place of NaN and infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab_long",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", choices=TEXTS, default="king_james")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, help="only these; default: all of the lab's")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3, help="so many; default: 3")
    parser.add_argument(
        "--rates", type=int, default=5, help="most rates that a recipe tries with the first seed"
    )
    parser.add_argument("--jobs", type=int, help="runs side by side; default: the number of cores")
    parser.add_argument("--limit-hours", type=float, help="stop after so long, with checkpoints")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab_long"), help="folder of the runs")
    parser.add_argument("--texts", type=Path, default=Path("runs/scale/texts"), help="folder of the texts")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of what is kept")
    parser.add_argument("--report", action="store_true", help="run nothing, and report what is there")
    parser.add_argument(
        "--wide-products", action="store_true", help="AVX-512 on AMD's processors; results differ by rounding"
    )
    parser.add_argument("--quick", action="store_true", help="tiny batches of two replicas, to try it")
    return parser.parse_args(args)


def main() -> int:
    """Returns the exit code; 143 where it was stopped before the end."""
    options = parsed(sys.argv[1:])
    try:
        if options.wide_products:
            widen(options.runs, "benchmarks.lab_long", sys.argv[1:])
        config = comparison(options)
        if not options.report:
            train(options, config)
        made = report(config, options)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 143
    options.kept.mkdir(parents=True, exist_ok=True)
    path = options.kept / f"{options.text}.json"
    write_json(path, made)
    print(f"{len(made['runs'])} runs, {len(made['claims'])} claims: {path}")
    return 0


if __name__ == "__main__" and (code := main()):
    sys.exit(code)
