"""Runs a part of the grid of evidence, and keeps each finished run in evidence/scale/PART.parquet.

    python -m benchmarks.scale replicas
    python -m benchmarks.scale replicas --jobs 1 --limit-hours 8
    python -m benchmarks.scale replicas --status

Finished runs are not repeated, and what is stopped goes on where it was, however it was stopped. Each recipe tries three rates,
each twice the one before, and further ones outwards as long as the best is the outermost, five at most; then the reference (the
better of dense Muon with β 0.9 and 0.95), one_bit_muon, and whatever ends within 1 % of either are run with two more seeds.
"""

import argparse
import fcntl
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.scale.grid import Grid
from benchmarks.scale.plan import MOST_RATES, PARTS, Part, smaller
from benchmarks.scale.products import widen
from benchmarks.scale.record import Record

from muonwire.compare.progress import time_text
from muonwire.compare.virtual import Job, run_jobs
from muonwire.errors import ExchangeError, StoppedError, UsageError

# The least time between two lines about runs that go on.
SAYS_EVERY_S = 300.0


def parsed(args: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--jobs", type=int, help="runs side by side; default: the number of cores")
    parser.add_argument("--limit-hours", type=float, help="stop after so long, with checkpoints")
    parser.add_argument(
        "--status", action="store_true", help="say what is done and left; run and write nothing"
    )
    parser.add_argument(
        "--evidence", type=Path, default=Path("evidence/scale"), help="folder of the parts' files"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/scale"), help="folder of the runs")
    parser.add_argument(
        "--texts", type=Path, help="folder of the texts; default: texts in the folder of the runs"
    )
    parser.add_argument(
        "--wide-products", action="store_true", help="AVX-512 on AMD's processors; results differ by rounding"
    )
    small = parser.add_argument_group(
        "to try it small (the runs are others, and belong into another --evidence)"
    )
    small.add_argument("--recipes", nargs="+", help="only these of each setting")
    small.add_argument("--settings", type=int, help="only so many settings, the first ones")
    small.add_argument(
        "--only", nargs="+", metavar="SETTING", help="only these, as the table's first column names them"
    )
    small.add_argument("--replicas", type=int, help="at most")
    small.add_argument("--steps", type=int)
    small.add_argument("--batch", type=int)
    small.add_argument("--seeds", type=int, nargs="+")
    small.add_argument(
        "--rates", type=int, default=MOST_RATES, help=f"most rates of a recipe; default: {MOST_RATES}"
    )
    small.add_argument("--no-compile", action="store_true")
    return parser.parse_args(args)


def chosen(options: argparse.Namespace) -> Part:
    """The part, or what is asked for of it."""
    part = PARTS[options.part]
    names = [str(setting.x) for setting in part.settings]
    if unknown := sorted(set(options.only or ()) - set(names)):
        raise UsageError(
            f"scale: {options.part} has no setting {', '.join(unknown)}; it has {', '.join(names)}"
        )
    settings = tuple(
        smaller(
            setting,
            steps=options.steps,
            replicas=options.replicas,
            batch=options.batch,
            seeds=options.seeds,
            recipes=options.recipes,
        )
        for setting in part.settings[: options.settings]
        if not options.only or str(setting.x) in options.only
    )
    return replace(part, settings=tuple(s for s in settings if s.recipes))


@contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Within the block no other command works in the folder of the runs.

    Raises:
        UsageError: another one does.
    """
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"scale: another command runs a part in {runs}; wait for it, or give another --runs"
            ) from error
        yield


class Teller:
    """Says a line for each finished run, and now and then for those that go on, with the time that is left.

    Args:
        grid: of the part.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._began_s = self._said_s = time.monotonic()
        # Work done by this command, of finished and of running jobs.
        self._finished = 0.0
        self._running: dict[Any, tuple[Job, int, int]] = {}

    def _cost(self, job: Job, steps: int) -> float:
        cost: float = self._grid.cost(job)
        return cost * steps / job.config.steps

    def _left(self) -> str:
        running = sum(self._cost(job, now - first) for job, first, now in self._running.values())
        done = self._finished + running
        _, left = self._grid.costs()
        left -= sum(self._cost(job, now) for job, _, now in self._running.values())
        if not done:
            return "time left unknown"
        seconds = max(left, 0.0) / done * (time.monotonic() - self._began_s)
        return f"at least {time_text(seconds)} left"

    def at(self, job: Job, step: int) -> None:
        """A job has come to a step."""
        _, first, _ = self._running.get(job.key, (job, step, step))
        self._running[job.key] = job, first, step
        if time.monotonic() - self._said_s > SAYS_EVERY_S:
            self._said_s = time.monotonic()
            going = "; ".join(
                f"{j.config.out.parent.name} {j.run} at {now}" for j, _, now in self._running.values()
            )
            print(f"… {going}: {self._left()}", flush=True)

    def finish(self, job: Job) -> None:
        """A job is finished."""
        _, first, _ = self._running.pop(job.key, (job, 0, 0))
        self._finished += self._cost(job, job.config.steps - first)
        row = self._grid.find(job)
        assert row is not None, "its result was written"
        loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
        print(f"{row['setting']} {job.run}: {loss}, {row['bits_sent']:.3g} bit ({self._left()})", flush=True)


def run(options: argparse.Namespace, command: str) -> None:
    """Run the part, or say what is left of it."""
    record = Record(options.evidence, options.part, writes=not options.status)
    part = chosen(options)
    grid = Grid(
        part,
        record,
        runs=options.runs,
        texts=options.texts or options.runs / "texts",
        command=command,
        compile=not options.no_compile,
        most=options.rates,
    )
    if options.status:
        done, left = grid.costs()
        for job in grid.left():
            print(f"left: {job.config.out.parent.name} {job.run}")
        print(f"{100 * done / ((done + left) or 1):.0f} % of the work is done, as far as it is known")
        return
    teller = Teller(grid)
    limited = f"scale: stopped; the same command goes on ({command})"
    with alone(options.runs):
        run_jobs(
            grid.left,
            jobs=options.jobs,
            modules=grid.modules,
            at=teller.at,
            finish=teller.finish,
            stopped=lambda: StoppedError(limited),
            limit_s=None if options.limit_hours is None else 3600 * options.limit_hours,
        )


def main() -> int:
    """Returns the exit code: 143 where it was stopped before the end, as `muonwire compare` does."""
    options = parsed(sys.argv[1:])
    try:
        if options.wide_products:
            widen(options.runs, "benchmarks.scale", sys.argv[1:])
        run(options, shlex.join(["python", "-m", "benchmarks.scale", *sys.argv[1:]]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ExchangeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 143
    return 0


if __name__ == "__main__":
    sys.exit(main())
