"""The share of the time that replicas stand still on an emulated link, with streaming and without.

    sudo .venv/bin/python benchmarks/streaming_wait.py --out evidence/streaming/wait.json

Each replica is a `muonwire train` of its own, on a host of its own in a network namespace, behind the link. The share comes from
metrics.jsonl of the first one: seconds in exchange over seconds of computing, of the optimizer and in exchange, all of one
stretch: from the end of the first few intervals, in which connections begin and buffers are made, to the step before the last,
which synchronizes everything at once. Runs that the file holds already are not repeated.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from muonwire.compare.hosts import Host, hosts, lacking
from muonwire.train.checkpoint import write_json
from muonwire.train.metrics import read_metrics
from muonwire.transport import Link

SOURCE = Path(__file__).resolve().parents[1] / "src"
PORT = 29400
RECIPES = (
    "one_bit_muon",
    "one_bit_muon(fragments=4)",
    "one_bit_muon(fragments=4, delay=1, mix=1.0)",
    "one_bit_muon(fragments=4, delay=2, mix=1.0)",
    "one_bit_muon(interval='auto', share=0.02)",
    "one_bit_muon(interval='auto', share=0.02, fragments=4, delay=2, mix=1.0)",
)
PARTS = ("compute_s", "optimizer_s", "exchange_s", "overlap_s")


def environment(host: Host, rank: int, options: argparse.Namespace) -> dict[str, str]:
    """What torchrun would tell the replica, which is the only one of its host."""
    held = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    told = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": options.replicas, "LOCAL_WORLD_SIZE": 1}
    place = {"MASTER_ADDR": host.address, "MASTER_PORT": PORT, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": 1}
    return {**held, **{key: str(value) for key, value in {**told, **place}.items()}}


def command(recipe: str, out: Path, options: argparse.Namespace) -> list[str]:
    """`muonwire train` without anything in the run that would disturb its steps."""
    words = {
        "recipe": recipe,
        "steps": options.steps,
        "evaluate-every": options.steps,
        "checkpoint-every": 0,
        "digest-every": 0,
        "probes": 0,
        "threads": 1,
        "lr": 0.01,
        "model-size": options.model_size,
        "sequence": 64,
        "batch": options.batch,
        "evaluation-sequences": 16,
        "out": out,
    }
    pairs = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "muonwire", "train", *pairs, "--no-page", "--no-tensorboard"]


def train(recipe: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The metrics of one run."""
    with hosts(options.replicas, link=Link.parse(options.link), rate="") as made:
        started = [
            host.start(
                command(recipe, folder / str(rank), options),
                env=environment(made[0], rank, options),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank, host in enumerate(made)
        ]
        try:
            said = [process.communicate(timeout=options.limit_s)[0] for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        for rank, process in enumerate(started):
            if process.returncode:
                sys.exit(f"{recipe}: replica {rank} ended with {process.returncode}:\n{said[rank]}")
    return read_metrics(folder / "0")


def measured(recipe: str, lines: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The parts of the time between two steps."""
    by_step = {line["step"]: line for line in lines}
    first, last = by_step[options.skip], by_step[options.steps - 1]
    spent = {part: last[part] - first[part] for part in PARTS}
    standing = spent["exchange_s"]
    told = [line["synchronization/interval"] for line in lines if "synchronization/interval" in line]
    return {
        "recipe": recipe,
        "link": options.link,
        "steps": options.steps,
        "skipped": options.skip,
        "wait_share": standing / (spent["compute_s"] + spent["optimizer_s"] + standing),
        **{part: round(value, 4) for part, value in spent.items()},
        "egress_bytes_per_step": (last["egress_bytes"] - first["egress_bytes"])
        / (options.steps - 1 - options.skip),
        "last_interval": told[-1] if told else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--link", default="10mbit/40ms")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--skip", type=int, default=100, help="steps before the stretch that is measured")
    parser.add_argument("--model-size", default="nano")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--limit-s", type=float, default=1800.0)
    options = parser.parse_args()
    if why := lacking():
        sys.exit(f"no link can be emulated here: {why}")
    if not 0 <= options.skip < options.steps - 1:
        parser.error(
            f"--skip is {options.skip}; with --steps {options.steps} it is below {options.steps - 1}"
        )
    settings = {key: vars(options)[key] for key in ("replicas", "model_size", "batch")}
    record: dict[str, Any] = {"settings": settings, "machine": platform.machine(), "cores": os.cpu_count()}
    runs: list[dict[str, Any]] = []
    if options.out.exists():
        held = json.loads(options.out.read_text())
        if held["settings"] != settings:
            parser.error(f"{options.out} holds runs with {held['settings']}, wanted are {settings}")
        runs = held["runs"]
    wanted = {"link": options.link, "steps": options.steps, "skipped": options.skip}
    for recipe in options.recipes:
        if any({**r, **wanted, "recipe": recipe} == r for r in runs):
            continue
        began_s = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="muonwire-wait-") as folder:
            lines = train(recipe, Path(folder), options)
        runs.append({**measured(recipe, lines, options), "seconds": round(time.perf_counter() - began_s, 1)})
        print(json.dumps(runs[-1]), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.out, {**record, "runs": runs})


if __name__ == "__main__":
    main()
