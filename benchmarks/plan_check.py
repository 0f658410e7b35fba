"""Holds `muonwire plan` against runs: six settings that its evidence does not have, predicted first and then run.

    sudo .venv/bin/python -m benchmarks.plan_check --out evidence/plan

Each setting has hosts in network namespaces with a link of its own. There `muonwire plan --measure` measures the link and the step,
and writes its prediction to prediction.json of the setting before anything is trained. Then its own command trains there, and
`muonwire compare --virtual` seeks the best rates of the recipe and of dense Muon for the same work, in a grid that grows until the
best rate lies inside it. Time is that of the steps, as
the first replica's metrics have it: without the start and evaluations. What is done is kept and not repeated, so that
`--times-only` may go first, while nothing else runs, and the losses later.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from muonwire.compare.hosts import Host, hosts, namespaces_allowed, replica_environment
from muonwire.train.metrics import read_metrics
from muonwire.transport.link import Link

SOURCE = Path(__file__).resolve().parents[1] / "src"
PORT = 29400
REFERENCE = "muon"
# Rates around those of the evidence, for recipes with Muon and with Adam inside. Each is twice the last, and a best rate at an end
# adds the next one there, at most so often.
GRIDS = {"muon": ("0.007", "0.014", "0.028"), "adam": ("0.00175", "0.0035", "0.007")}
MOST_ADDED = 5
SHARED = "sign(scale=shared)"
LONGEST_S = 3600.0
# What a prediction of time may be off by, as a share of what was measured.
TIME_WITHIN = 0.2


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting.

    Args:
        name: of its file.
        recipe: as `muonwire plan --recipes` takes it.
        link: of each host.
        replicas: one a host.
        model_size: of the Llama.
        steps: of the run.
        share: of the time that exchange may take.
        batch: sequences a replica and step.
        grid: of rates.
    """

    name: str
    recipe: str
    link: str
    replicas: int
    model_size: str
    steps: int
    share: float = 0.3
    batch: int = 8
    grid: str = "muon"


# None is a row of the evidence: other links, H, replicas, sizes or lengths.
SETTINGS = (
    Setting(
        name="one_bit_nano",
        recipe="one_bit_muon",
        link="10mbit/10ms",
        replicas=4,
        model_size="nano",
        steps=600,
    ),
    Setting(
        name="lossless_eight",
        recipe=f"one_bit_muon(interval=20, means='lossless', codec='{SHARED}', vector_codec='{SHARED}')",
        link="1mbit:10mbit/40ms",
        replicas=8,
        model_size="pico",
        steps=800,
    ),
    Setting(
        name="muloco_two",
        recipe="muloco(interval=12)",
        link="1mbit/20ms",
        replicas=2,
        model_size="pico",
        steps=800,
    ),
    Setting(
        name="streaming_pico",
        recipe="one_bit_muon(fragments=4, delay=1)",
        link="2mbit/5ms",
        replicas=4,
        model_size="pico",
        steps=800,
        share=0.2,
    ),
    Setting(
        name="demo_nano",
        recipe="demo",
        link="20mbit/10ms",
        replicas=3,
        model_size="nano",
        steps=400,
        grid="adam",
    ),
    Setting(
        name="adamw_nano",
        recipe="adamw",
        link="100mbit/2ms",
        replicas=4,
        model_size="nano",
        steps=400,
        grid="adam",
    ),
)
SMALL = (
    Setting(
        name="small_one_bit",
        recipe="one_bit_muon",
        link="5mbit/10ms",
        replicas=2,
        model_size="pico",
        steps=60,
        batch=4,
    ),
    Setting(
        name="small_streaming",
        recipe="one_bit_muon(interval=8, fragments=2, delay=1, means='recompressed')",
        link="1mbit/10ms",
        replicas=2,
        model_size="pico",
        steps=60,
        batch=4,
    ),
    Setting(
        name="small_muon", recipe="muon", link="40mbit/2ms", replicas=2, model_size="pico", steps=12, batch=4
    ),
)


def task_words(setting: Setting) -> list[str]:
    return ["--model-size", setting.model_size, "--sequence", "64", "--batch", str(setting.batch)]


def on_all(machines: Sequence[Host], words: Sequence[str], folder: Path) -> tuple[str, float]:
    """Run a command of muonwire on every host, one replica each; what the first one prints, and the seconds."""
    started, files = [], []
    begun_s = time.monotonic()
    for rank, host in enumerate(machines):
        place = folder / f"host{rank}"
        place.mkdir(parents=True, exist_ok=True)
        out, err = (place / "out.txt").open("w+"), (place / "err.txt").open("w+")
        files += [out, err]
        env = replica_environment(machines, rank, port=PORT) | {"PYTHONPATH": str(SOURCE)}
        command = [sys.executable, "-m", "muonwire", *words]
        started.append(host.start(command, env=env, stdout=out, stderr=err, cwd=place))
    try:
        codes = [process.wait(LONGEST_S) for process in started]
    finally:
        for process in started:
            process.kill()
    seconds = time.monotonic() - begun_s
    for file in files:
        file.seek(0)
    if any(codes):
        errors = "\n".join(file.read()[-1500:] for file in files)
        raise SystemExit(f"muonwire {' '.join(words)} ended with {codes}:\n{errors}")
    said = files[0].read()
    for file in files:
        file.close()
    return said, seconds


def predict(setting: Setting, machines: Sequence[Host], folder: Path) -> dict[str, Any]:
    """What plan says of the setting, before anything is trained."""
    words = ["plan", "--measure", "--json", "--steps", str(setting.steps), "--share", str(setting.share)]
    words += ["--recipes", setting.recipe, *task_words(setting)]
    said, _ = on_all(machines, words, folder / "plan")
    plan: dict[str, Any] = json.loads(said[said.index("{\n") :])
    (line,) = plan.pop("recipes")
    return {"line": line, **plan}


def train(setting: Setting, line: dict[str, Any], machines: Sequence[Host], folder: Path) -> dict[str, Any]:
    """The run that plan recommends, on the same hosts."""
    words = [
        "train",
        "--recipe",
        line["recipe"],
        "--lr",
        f"{line['cost']['lr']:g}",
        "--steps",
        str(setting.steps),
    ]
    words += [
        "--evaluate-every",
        str(setting.steps),
        "--checkpoint-every",
        "0",
        "--digest-every",
        "0",
        "--probes",
        "0",
    ]
    words += ["--no-tensorboard", "--no-page", "--out", "run", *task_words(setting)]
    _, seconds = on_all(machines, words, folder / "train")
    run = folder / "train" / "host0" / "run"
    last = read_metrics(run)[-1]
    result = json.loads((run / "result.json").read_text())
    parts = {key: last[key] for key in ("compute_s", "optimizer_s", "exchange_s")}
    return {
        **parts,
        "steps_s": sum(parts.values()),
        "whole_s": seconds,
        "final_eval_loss": result["final_eval_loss"],
        "egress_bytes": last["egress_bytes"],
        "received_bytes": last["received_bytes"],
        "weights_digest": result["weights_digest"],
    }


def best_loss(setting: Setting, recipe: str, grid: Sequence[str], folder: Path) -> dict[str, Any]:
    """The loss of the best rate for the same work, by virtual replicas; a best rate at an end of the grid adds one there."""
    words = ["compare", "--virtual", "--recipes", recipe, "--seeds", "0"]
    words += [
        "--replicas",
        str(setting.replicas),
        "--steps",
        str(setting.steps),
        "--evaluate-every",
        str(setting.steps),
    ]
    words += [*task_words(setting), "--out", str(folder)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    rates = [float(rate) for rate in grid]
    for _ in range(1 + MOST_ADDED):
        command = [sys.executable, "-m", "muonwire", *words, "--lr-grid", *(f"{rate:g}" for rate in rates)]
        # Runs of the rates before are kept in the folder, and not repeated.
        subprocess.run(command, check=True, env=env, capture_output=True)
        (entry,) = json.loads((folder / "summary.json").read_text())
        if not entry["lr_at_grid_edge"]:
            break
        rates = [rates[0] / 2, *rates] if entry["lr"] == rates[0] else [*rates, 2 * rates[-1]]
    kept = {key: entry[key] for key in ("recipe", "lr", "lr_at_grid_edge", "final_eval_loss")}
    return kept | {"grid": rates}


def run_it(setting: Setting, out: Path, folder: Path) -> dict[str, Any]:
    """Predict, then run: the record of the setting as far as the link and the clock decide it."""
    with hosts(setting.replicas, link=Link.parse(setting.link)) as machines:
        prediction = predict(setting, machines, folder)
        (out / f"{setting.name}.prediction.json").write_text(json.dumps(prediction, indent=1) + "\n")
        line = prediction["line"]
        measured = train(setting, line, machines, folder)
    if measured["final_eval_loss"] is None:
        raise SystemExit(f"{setting.name}: {line['recipe']} diverged at lr {line['cost']['lr']}")
    return {
        "setting": asdict(setting),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "prediction": prediction,
        "measured": measured,
        "time_ratio": line["total_s"] / measured["steps_s"],
        "bytes_ratio": line["total_up_bytes"] / measured["egress_bytes"],
        "time_holds": abs(line["total_s"] / measured["steps_s"] - 1) <= TIME_WITHIN,
    }


def losses_of(setting: Setting, line: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the record has besides: the best losses of the recipe and of dense Muon."""
    dense = own = None
    cost = 0.0
    if line["recipe"] != REFERENCE:
        dense = best_loss(setting, REFERENCE, GRIDS["muon"], folder / "dense")
        own = best_loss(setting, line["recipe"], GRIDS[setting.grid], folder / "own")
        cost = own["final_eval_loss"] / dense["final_eval_loss"] - 1
    bounds = line["cost"]
    return {"dense": dense, "own": own, "cost": cost, "loss_holds": bounds["low"] <= cost <= bounds["high"]}


def said_of(record: dict[str, Any]) -> str:
    line, cost = record["prediction"]["line"], record["prediction"]["line"]["cost"]
    measured = f"{100 * record['cost']:+.1f} measured" if "cost" in record else "not measured yet"
    return (
        f"{record['setting']['name']}: {line['recipe']}: time {line['total_s']:.1f} s predicted, "
        f"{record['measured']['steps_s']:.1f} measured (x{record['time_ratio']:.2f}); bytes x{record['bytes_ratio']:.3f}; "
        f"loss {100 * cost['expected']:+.1f} % ({100 * cost['low']:+.1f} to {100 * cost['high']:+.1f}) predicted, {measured}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="three settings of seconds, to try the harness")
    parser.add_argument("--only", nargs="*", default=None, help="names of settings")
    parser.add_argument(
        "--times-only", action="store_true", help="leave losses to a later call, which needs no quiet cores"
    )
    given = parser.parse_args()
    if not given.small and not namespaces_allowed():
        raise SystemExit("plan_check: network namespaces are not allowed here; run it as root on Linux")
    given.out.mkdir(parents=True, exist_ok=True)
    holds = True
    for setting in SMALL if given.small else SETTINGS:
        if given.only is not None and setting.name not in given.only:
            continue
        path = given.out / f"{setting.name}.json"
        with tempfile.TemporaryDirectory(prefix="muonwire-plan-") as name:
            record = json.loads(path.read_text()) if path.exists() else run_it(setting, given.out, Path(name))
            path.write_text(json.dumps(record, indent=1) + "\n")
            if "cost" not in record and not given.times_only:
                record |= losses_of(setting, record["prediction"]["line"], Path(name))
                path.write_text(json.dumps(record, indent=1) + "\n")
        holds = holds and record["time_holds"] and record.get("loss_holds", True)
        print(said_of(record), flush=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
