"""What fragments, delay and mixing cost one_bit_muon in loss: runs on the text task, replicas as threads.

python benchmarks/streaming.py --out evidence/streaming/text.json
python benchmarks/streaming.py --out runs/streaming.json --steps 100 --seeds 0 --fragments 2 --delays 1 --mixes 1

Runs that the file holds already are not repeated. Every run has the same data order, rates and interval; each seed's loss is
compared with that of the same seed without fragments and delay.
"""

import argparse
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from muonwire.tasks import TextSettings
from muonwire.train.config import TrainConfig
from muonwire.train.launch import set_threads
from muonwire.train.loop import RunResult, Trainer
from muonwire.transport import Transport, run_threads


def recipes(options: argparse.Namespace) -> Iterator[str]:
    """The baseline first, then every setting; a mix only where there is a delay."""
    base = f"interval={options.interval}"
    yield f"one_bit_muon({base})"
    for fragments, delay in itertools.product(options.fragments, sorted({0, *options.delays})):
        if (fragments, delay) == (1, 0):
            continue
        for mix in options.mixes if delay else [None]:
            given = {"fragments": fragments, "delay": delay, "mix": mix}
            plain = {"fragments": 1, "delay": 0, "mix": None}
            chosen = ", ".join(f"{k}={v}" for k, v in given.items() if v != plain[k])
            yield f"one_bit_muon({base}, {chosen})"


def run(recipe: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run of all replicas; its final loss, bytes and seconds."""
    config = TrainConfig(
        recipe=recipe,
        lr=options.lr,
        steps=options.steps,
        seed=seed,
        evaluate_every=options.steps,
        checkpoint_every=0,
        digest_every=100,
        probes=0,
        tensorboard=False,
        task=TextSettings(model_size=options.model_size, sequence=64, batch=options.batch),
    )
    task = config.task.make()
    folder = Path(tempfile.mkdtemp(prefix="muonwire-streaming-"))
    began_s = time.perf_counter()

    def replica(rank: int, make_transport: Callable[[], Transport]) -> RunResult:
        return Trainer(config, task, make_transport(), folder / str(rank), device="cpu").run()

    try:
        results = run_threads(replica, replicas=options.replicas)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first = results[0]
    assert len({r.weights_digest for r in results}) == 1
    return {
        "recipe": recipe,
        "seed": seed,
        "final_eval_loss": first.final_eval_loss,
        "bits_per_parameter_step": first.bits_per_parameter_step,
        "num_parameters": first.num_parameters,
        "weights_digest": first.weights_digest,
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each setting the mean over the seeds of its loss over the baseline's with the same seed, in percent, and their spread."""
    by_recipe: dict[str, dict[int, float]] = {}
    for r in runs:
        if r["final_eval_loss"] is not None:
            by_recipe.setdefault(r["recipe"], {})[r["seed"]] = r["final_eval_loss"]
    base = next(iter(by_recipe.values()), {})
    lines = []
    for recipe, losses in by_recipe.items():
        over = [100 * (loss / base[seed] - 1) for seed, loss in losses.items() if seed in base]
        if not over:
            continue
        lines.append(
            {
                "recipe": recipe,
                "seeds": sorted(losses),
                "loss": round(fmean(losses.values()), 5),
                "percent_over_baseline": round(fmean(over), 3),
                "standard_deviation": round(stdev(over), 3) if len(over) > 1 else None,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--interval", type=int, default=11)
    parser.add_argument("--fragments", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--delays", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--mixes", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--model-size", default="pico")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    set_threads(os.cpu_count() or 1, None)
    settings = {k: v for k, v in vars(options).items() if k in ("interval", "steps", "lr", "replicas")}
    settings |= {"model_size": options.model_size, "batch": options.batch, "sequence": 64, "task": "text"}
    runs: list[dict[str, Any]] = []
    if options.out.exists():
        held = json.loads(options.out.read_text())
        if held["settings"] != settings:
            parser.error(f"{options.out} holds runs with {held['settings']}, wanted are {settings}")
        runs = held["runs"]
    for seed, recipe in itertools.product(options.seeds, list(recipes(options))):
        if any(r["recipe"] == recipe and r["seed"] == seed for r in runs):
            continue
        runs.append(run(recipe, seed, options))
        print(json.dumps(runs[-1]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"settings": settings, "summary": summary(runs), "runs": runs}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    for line in summary(runs):
        print(line)


if __name__ == "__main__":
    main()
