"""The race: time to dense AdamW's final loss on emulated links, one_bit_muon against the best setting of each peer.

    sudo .venv/bin/python -m benchmarks.race --out runs/race --record evidence/emulate/race.json

Two calls of `muonwire compare`: the first seeks the recipes' learning rates with virtual replicas, the second the peers', and
trains each at its best rate on each link. All get the same grid. The record has every time, and whether one_bit_muon was
as many times faster as it must be: 50 times than the best dense training, 5 times than DeMo, 3 times than torchft's DiLoCo,
2 times than MuLoCo.
On two cores it takes about 80 minutes. It may be cut off: the same command goes on. `--families` leaves others out; of dense
training it then has Muon alone on the links, which needs the fewest steps.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = (
    "one_bit_muon",
    "one_bit_muon(interval=28, growth=0.045, outer_momentum=0.5)",
    "one_bit_muon(fragments=4, delay=3)",
    "one_bit_muon(interval=28, growth=0.045, outer_momentum=0.5, fragments=4, delay=4)",
)
# How many times faster than the best of each family the best of ours must be; None: shown only.
FAMILIES: Mapping[str, tuple[float | None, tuple[str, ...]]] = {
    "dense": (50, ("adamw", "muon", "ddp_adamw", "ddp_muon")),
    "DeMo": (5, ("demo", "demo(k=8)", "demo(k=2)")),
    "torchft's DiLoCo": (
        3,
        (
            "torchft_diloco(interval=10)",
            "torchft_diloco(interval=20)",
            "torchft_diloco(interval=40)",
            "torchft_diloco(interval=20, fragments=2, delay=5)",
        ),
    ),
    "MuLoCo": (2, ("muloco(interval=10)", "muloco", "muloco(interval=60)")),
    "SparseLoCo": (None, ("sparseloco(interval=10)", "sparseloco")),
    "DDP with PowerSGD": (None, ("ddp_muon(hook='powersgd', rank=2)",)),
}
REFERENCE = "adamw"
LINKS = ("10mbit/40ms", "100mbit/40ms", "20mbit:200mbit/40ms")
LR_GRID = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032)


def is_peer(name: str) -> bool:
    return name.startswith(("ddp_", "torchft_"))


def families(options: argparse.Namespace) -> Mapping[str, tuple[float | None, tuple[str, ...]]]:
    """Those that were asked for."""
    if options.families is None:
        return FAMILIES
    chosen = {name: FAMILIES[name] for name in options.families}
    if "dense" in chosen:
        chosen["dense"] = (FAMILIES["dense"][0], ("muon",))
    return chosen


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The two calls of ``muonwire compare``."""
    names = [name for _, settings in families(options).values() for name in settings]
    recipes = [REFERENCE, *OURS, *(n for n in names if not is_peer(n) and n != REFERENCE)]
    shared = [
        "muonwire",
        "compare",
        "--recipes",
        *recipes,
        "--lr-grid",
        *(f"{lr:g}" for lr in options.lr_grid),
    ]
    shared += ["--seeds", "0", "--replicas", str(options.replicas), "--steps", str(options.steps)]
    shared += ["--evaluate-every", str(options.evaluate_every), "--model-size", options.model_size]
    shared += ["--sequence", str(options.sequence), "--batch", str(options.batch), "--threads", "1"]
    shared += ["--out", str(options.out)]
    peers = [n for n in names if is_peer(n)]
    links = ["--emulate", *options.links]
    if options.families is not None:
        links += ["--emulate-recipes", *OURS, *(n for n in names if n != REFERENCE)]
    return [[*shared, "--virtual"], [*shared, *(["--peers", *peers] if peers else []), *links]]


def verdicts(
    summary: Sequence[Mapping[str, Any]],
    link: str,
    of: Mapping[str, tuple[float | None, tuple[str, ...]]] = FAMILIES,
) -> list[dict[str, Any]]:
    """For each family, the best times on a link, and whether ours is as many times faster as it must be."""
    times = {
        entry["recipe"]: entry["links"][link]["measured_s_to_target"] for entry in summary if entry["links"]
    }
    reached = {name: seconds for name, seconds in times.items() if seconds is not None}
    ours = min((name for name in OURS if name in reached), key=lambda n: reached[n], default=None)
    found = []
    for family, (wanted, settings) in of.items():
        best = min((name for name in settings if name in reached), key=lambda n: reached[n], default=None)
        # One that never got there was not faster.
        times_faster = reached[best] / reached[ours] if ours and best else None
        holds = None
        if wanted is not None:
            holds = ours is not None and (times_faster is None or times_faster >= wanted)
        found.append(
            {
                "link": link,
                "family": family,
                "best": best,
                "best_s": reached.get(best) if best else None,
                "ours": ours,
                "ours_s": reached.get(ours) if ours else None,
                "times_faster": None if times_faster is None else round(times_faster, 2),
                "wanted": wanted,
                "holds": holds,
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    parser.add_argument("--record", type=Path, help="default: race.json in --out")
    parser.add_argument("--links", nargs="+", default=list(LINKS))
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--evaluate-every", type=int, default=10)
    parser.add_argument("--model-size", default="nano")
    parser.add_argument("--sequence", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr-grid", type=float, nargs="+", default=list(LR_GRID))
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), help="default: all")
    options = parser.parse_args()
    for command in commands(options):
        print(shlex.join(command), flush=True)
        subprocess.run([sys.executable, "-m", *command], check=True)
    summary = json.loads((options.out / "summary.json").read_text())
    emulated = [
        link
        for link in summary[0]["links"]
        if all(
            e["links"][link]["emulated"]
            for e in summary
            if e["links"] and (options.families is None or e["recipe"] != REFERENCE)
        )
    ]
    found = [v for link in emulated for v in verdicts(summary, link, families(options))]
    record = {
        "commands": [shlex.join(command) for command in commands(options)],
        "target": next(e["final_eval_loss"] for e in summary if e["recipe"] == REFERENCE),
        "num_parameters": summary[0]["num_parameters"],
        "verdicts": found,
        "runs": [
            {key: entry[key] for key in ("recipe", "lr", "lr_at_grid_edge", "final_eval_loss", "links")}
            for entry in summary
        ],
    }
    path = options.record or options.out / "race.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    for v in found:
        wanted = (
            ""
            if v["wanted"] is None
            else f", wanted {v['wanted']:g}: {'holds' if v['holds'] else 'does not hold'}"
        )
        if v["ours"] is None:
            outcome = "one_bit_muon never reached the loss"
        elif v["times_faster"] is None:
            outcome = f"never reached the loss; {v['ours']} did in {v['ours_s']:.1f} s"
        else:
            outcome = f"{v['times_faster']:.1f} times slower (best: {v['best']}) than {v['ours']}, {v['ours_s']:.1f} s"
        print(f"{v['link']}: {v['family']}: {outcome}{wanted}")
    return 0 if found and all(v["holds"] is not False for v in found) else 1


if __name__ == "__main__":
    sys.exit(main())
