"""The lab's claims about training on images, again after 1500 steps in place of 150.

    python -m benchmarks.lab_long_vision
    python -m benchmarks.lab_long_vision --claims vit.6 vit.7 --seeds 2

Each method's rate is sought anew at this length, with the seed that the lab seeks it with, among the five that the lab tries: from
the middle one downhill until both neighbours are worse. A run takes minutes on a core. Each run and each claim that is measured is
kept, so that the same command goes on. What the claims' own checks say is written beside the lab's verdicts to
evidence/lab_long/vision.json as each claim is done.
"""

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.lab_long import KEPT, LAB, STEPS, against_the_lab, lines
from benchmarks.scale.products import are_wide, widen

from muonwire.errors import UsageError
from muonwire.lab import Setting
from muonwire.lab.claims import vision
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.engine.check import Row
from muonwire.lab.engine.input import write_about
from muonwire.lab.inputs import vision_training
from muonwire.lab.inputs.vision_training import METHODS, TUNING_SEED, VISION_RATES, Outcome, vision_task
from muonwire.tasks import VisionTask
from muonwire.train.checkpoint import write_json

# Of those of this note, the ones that look at whole runs; those first that share rates with the rest.
CLAIMS = ("vit.7", "vit.8", "vit.6", "vit.4", "vit.3", "vit.5")
train = vision_training.train
tuned_factors = vision_training.tuned_factors


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While no other process is at what ``path`` keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def kept_run(folder: Path, task: VisionTask, recipe: str, *, lr: float, seed: int, steps: int) -> Outcome:
    """``vision_training.train``, done once whoever asks for it."""
    about = {"task": repr(task.settings), "recipe": recipe, "lr": lr, "seed": seed, "steps": steps}
    path = folder / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    with alone(path):
        if not path.exists():
            outcome = train(task, recipe, lr=lr, seed=seed, steps=steps)
            write_json(path, {**about, **asdict(outcome)})
        kept = json.loads(path.read_text())
    return Outcome(loss=kept["loss"], accuracy=kept["accuracy"], decrease=kept["decrease"])


def downhill(loss: Callable[[int], float], middle: int, *, count: int) -> int:
    """Where ``loss`` is lowest among 0 to ``count`` - 1, from the middle until both neighbours are higher, or there is none.

    Examples:
        >>> downhill([5, 4, 3, 2, 9].__getitem__, 2, count=5)
        3
        >>> downhill([0, 4, 5, 7, 8].__getitem__, 2, count=5)
        0
    """
    for direction in (-1, 1):
        best = middle
        while 0 <= best + direction < count and loss(best + direction) < loss(best):
            best += direction
        if best != middle:
            return best
    return middle


def sought_rate(steps: int, quick: bool, folder: Path, model: str, method: str) -> float:
    """``vision_training.tuned_rate`` after ``steps``, sought where nobody has asked for it before.

    Args:
        steps: of a run.
        quick: whether the model is small, and there is one rate.
        folder: of the input "vision-rates".
        model: "vit" or "resnet".
        method: a key of METHODS.
    """
    factors = tuned_factors(quick)
    task, tried = vision_task(model, quick=quick), METHODS[method]

    def loss(at: int) -> float:
        lr = tried.centre * factors[at]
        return vision_training.train(task, tried.recipe, lr=lr, seed=TUNING_SEED, steps=steps).loss

    return tried.centre * factors[downhill(loss, len(factors) // 2, count=len(factors))]


def be_long(steps: int, quick: bool, folder: Path) -> None:
    """Have this process train ``steps``, its runs kept in ``folder`` and its rates sought as they are asked for."""
    torch.set_num_threads(1)
    taken = vision_training.QUICK_STEPS if quick else steps
    replaced = {
        "STEPS": steps,
        "train": partial(kept_run, folder / "runs"),
        "tuned_rate": partial(sought_rate, taken, quick),
    }
    # Before the claims are imported, which make constants of it.
    vision_training.STEPS = steps
    load_claims()
    for module in (vision_training, *(m for n, m in sys.modules.items() if n.startswith(vision.__name__))):
        for name in replaced.keys() & vars(module).keys():
            setattr(module, name, replaced[name])
    # Made, as far as the claims can tell.
    rates = VISION_RATES.folder(folder, quick=quick)
    rates.mkdir(parents=True, exist_ok=True)
    write_about(rates, {"seed": TUNING_SEED, "steps": taken})


def place(folder: Path, name: str, seed: int) -> Path:
    """Of a claim's rows."""
    return folder / "rows" / f"{name}-{seed}.json"


def measure(folder: Path, quick: bool, name: str, seed: int) -> None:
    """Write a claim's rows of one seed."""
    claim = load_claims()[name]
    setting = Setting(seed=seed, quick=quick, folder=folder, inputs=claim.inputs)
    rows = [{"seed": seed, **row} for row in claim.measure(setting)]
    place(folder, name, seed).parent.mkdir(parents=True, exist_ok=True)
    write_json(place(folder, name, seed), rows)


def table(kept: Path) -> str:
    """Of what is kept, in Markdown."""
    made = json.loads(kept.read_text())
    seeds = sorted({claim["seeds"] for claim in made["claims"].values()})
    text: str = lines(dict(sorted(made["claims"].items())), made["steps"])
    return f"{' to '.join(map(str, seeds))} seed{'s' * (seeds != [1])}.\n\n{text}"


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
    parser.add_argument("--jobs", type=int, help="runs side by side; default: the number of cores")
    parser.add_argument("--runs", type=Path, default=Path("runs/lab_long/vision"), help="folder of the runs")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of what is kept")
    parser.add_argument(
        "--wide-products", action="store_true", help="AVX-512 on AMD's processors; results differ by rounding"
    )
    parser.add_argument("--quick", action="store_true", help="two steps of small models, to try it")
    return parser.parse_args(args)


def main() -> int:
    """Returns the exit code."""
    options = parsed(sys.argv[1:])
    folder = options.runs / ("quick" if options.quick else str(options.steps))
    if options.wide_products:
        try:
            widen(options.runs, "benchmarks.lab_long_vision", sys.argv[1:])
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    kept, how = options.kept / "vision.json", (options.steps, options.quick, folder)
    before = json.loads(kept.read_text()) if kept.exists() else {}
    # Those of other claims stay.
    claims: dict[str, Any] = before["claims"] if before.get("steps") == options.steps else {}
    options.kept.mkdir(parents=True, exist_ok=True)
    be_long(*how)

    def report(name: str) -> None:
        paths = [place(folder, name, seed) for seed in range(options.seeds)]
        rows: list[Row] = [row for p in paths if p.exists() for row in json.loads(p.read_text())]
        claims[name] = against_the_lab(load_claims()[name], rows, json.loads(LAB.read_text()))
        write_json(kept, {"steps": options.steps, "wide_products": are_wide(), "claims": claims})
        print(
            f"{name}, {claims[name]['seeds']} seeds: {claims[name]['verdict']}, "
            f"in the lab {claims[name]['verdict_in_the_lab']}",
            flush=True,
        )

    cases = [(name, seed) for seed in range(options.seeds) for name in options.claims]
    wanted = [case for case in cases if not place(folder, *case).exists()]
    if options.quick:
        for case in wanted:
            measure(folder, True, *case)
    else:
        with ProcessPoolExecutor(
            options.jobs or os.cpu_count(), multiprocessing.get_context("spawn"), be_long, how
        ) as pool:
            waits = {pool.submit(measure, folder, False, *case): case for case in wanted}
            for future in as_completed(waits):
                future.result()
                report(waits[future][0])
    for name in options.claims:
        report(name)
    return 0


if __name__ == "__main__" and (code := main()):
    sys.exit(code)
