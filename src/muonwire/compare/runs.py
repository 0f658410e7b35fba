"""The runs of a comparison: where each lives, which are done, and what is left to do."""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from muonwire.compare.config import Comparison
from muonwire.compare.peers.train import PeerConfig, PeerTrainer
from muonwire.errors import StoppedError, UsageError
from muonwire.tasks import Task
from muonwire.train.checkpoint import write_json
from muonwire.train.config import TrainConfig
from muonwire.train.loop import RESULT, RunResult, Trainer
from muonwire.train.single import CONFIG
from muonwire.transport import Transport

Result = dict[str, Any]
# Rates of a finalist that are run in full after the short runs: the best one and the next lower ones.
MOST_IN_FULL = 3


class Run(NamedTuple):
    """One run of a comparison; ``tuning`` where it only tries a rate, with fewer steps."""

    recipe: str
    lr: float
    seed: int
    tuning: bool = False

    def __str__(self) -> str:
        return f"{self.recipe} lr={self.lr:g} seed={self.seed}{' (tuning)' * self.tuning}"


Find = Callable[[Run], Result | None]


def run_folder(out: Path, recipe: str, lr: float, seed: int, tuning: bool = False) -> Path:
    """Where a run lives: readable, and distinct for recipes that differ in their options only."""
    slug = re.sub(r"[^\w.=-]+", "_", recipe).strip("_")[:60]
    if slug != recipe:
        slug += "-" + hashlib.blake2b(recipe.encode(), digest_size=3).hexdigest()
    return out / ("tuning" if tuning else "runs") / slug / f"lr={lr:g},seed={seed}"


def read_result(folder: Path, config: TrainConfig | PeerConfig, *, replicas: int) -> Result | None:
    """The result of a finished run with exactly these settings, or None."""
    try:
        result: Result = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError):
        return None
    same = (
        result.get("config") == json.loads(json.dumps(config.identity()))
        and result.get("replicas") == replicas
    )
    return result if same and result.get("finished") else None


def _losses(find: Find, runs: Sequence[Run]) -> dict[float, float]:
    """Final evaluation loss by rate, of the runs that are done and did not diverge."""
    results = [(run.lr, find(run)) for run in runs]
    return {
        lr: result["final_eval_loss"]
        for lr, result in results
        if result is not None and result["final_eval_loss"] is not None
    }


def outwards(
    grid: Sequence[Run], find: Find, *, begin: int | None = None, most: int | None = None
) -> list[Run]:
    """Those of the runs that are to be tried, as far as they are known by now.

    First one of them and its two neighbours. As long as the best rate so far is the lowest or highest that was tried, the next
    one beyond it follows, so that the best lies between two worse ones or at the grid's edge. Rates that diverge count as the
    worst, the higher the worse.

    Args:
        grid: runs that differ in their rates only, which rise.
        find: looks up a finished run.
        begin: index of the first. Default: the middle.
        most: how many are tried at most. Default: all of them.
    """
    begin, most = len(grid) // 2 if begin is None else begin, len(grid) if most is None else most
    low = max(begin - (most > 1), 0)
    high = min(begin + (most > 2), len(grid) - 1)
    while high - low + 1 < most and all(find(run) for run in grid[low : high + 1]):
        losses = _losses(find, grid[low : high + 1])
        best = min(losses, key=lambda lr: (losses[lr], lr), default=grid[low].lr)
        if best == grid[low].lr and low > 0:
            low -= 1
        elif best == grid[high].lr and high < len(grid) - 1:
            high += 1
        else:
            break
    return list(grid[low : high + 1])


def short_runs(config: Comparison, recipe: str, find: Find) -> list[Run]:
    """The runs that only try a rate, as far as they are known by now (see ``outwards``); none where rates are tried in full."""
    if not config.tune_steps:
        return []
    return outwards([Run(recipe, lr, config.seeds[0], True) for lr in sorted(config.lr_grid)], find)


def tuning_losses(config: Comparison, recipe: str, find: Find) -> dict[float, float]:
    """Final evaluation loss by rate, of the short runs that are done and did not diverge."""
    return _losses(find, short_runs(config, recipe, find))


def candidates(config: Comparison, recipe: str, find: Find) -> list[float]:
    """Rates to run in full with the first seed: the recipe's rates, or what the short runs leave of the grid.

    Longer runs want lower rates than short ones. So finalists run the best short rate and the two next lower ones, and the other
    recipes only the next lower one. Where all of them diverge, the next lower one follows.
    """
    if not config.tune_steps:
        return list(config.rates_of(recipe))
    losses = tuning_losses(config, recipe, find)
    if not losses:
        return []
    best = min(losses, key=lambda lr: (losses[lr], lr))
    falling = sorted((lr for lr in config.lr_grid if lr <= best), reverse=True)
    chosen = falling[:MOST_IN_FULL] if config.is_finalist(recipe) else falling[:2][-1:]
    lower = [lr for lr in falling if lr < chosen[-1]]

    def diverged(lr: float) -> bool:
        result = find(Run(recipe, lr, config.seeds[0]))
        return result is not None and result["final_eval_loss"] is None

    while lower and all(diverged(lr) for lr in chosen):
        chosen.append(lower.pop(0))
    return chosen


def best_lr(config: Comparison, recipe: str, find: Find) -> float | None:
    """The rate of the lowest final evaluation loss in full with the first seed; None where no run reached one."""
    chosen = candidates(config, recipe, find)
    losses = _losses(find, [Run(recipe, lr, config.seeds[0]) for lr in chosen])
    return min(losses, key=lambda lr: (losses[lr], lr)) if losses else None


def find_result(config: Comparison) -> Find:
    """A look-up of finished runs."""

    def find(run: Run) -> Result | None:
        settings = config.run_config(run.recipe, run.lr, run.seed, tuning=run.tuning)
        return read_result(run_folder(config.out, *run), settings, replicas=config.replicas)

    return find


def pending(config: Comparison, *, peers: bool | None = None) -> list[Run]:
    """What is left to run, recipe by recipe: the rates, shortly or in full, then the best one with the other seeds.

    Args:
        config: the comparison.
        peers: of the peers only, or of the recipes only. Default: of both.
    """
    find = functools.cache(find_result(config))
    left: list[Run] = []
    for recipe in config.recipes:
        if peers is not None and peers != (recipe in config.peers):
            continue
        missing = [run for run in short_runs(config, recipe, find) if find(run) is None]
        if not missing:
            tried = [Run(recipe, lr, config.seeds[0]) for lr in candidates(config, recipe, find)]
            missing = [run for run in tried if find(run) is None]
        best = None if missing else best_lr(config, recipe, find)
        if best is not None:
            seeds = [Run(recipe, best, seed) for seed in config.seeds_of(recipe)]
            missing = [run for run in seeds if find(run) is None]
        left += missing
    return left


def plan(config: Comparison) -> tuple[list[int], list[int]]:
    """The steps of each finished run, and of each run that is left, where a rate is still sought as many as there may be."""
    find = functools.cache(find_result(config))
    done: list[int] = []
    left: list[int] = []
    for recipe in config.recipes:
        first, *others = config.seeds_of(recipe)
        runs = short_runs(config, recipe, find)
        if any(find(run) is None for run in runs):
            num_later = min(MOST_IN_FULL if config.is_finalist(recipe) else 1, len(config.lr_grid)) + len(
                others
            )
        else:
            in_full = [Run(recipe, lr, first) for lr in candidates(config, recipe, find)]
            best = best_lr(config, recipe, find)
            sought = any(find(run) is None for run in in_full)
            num_later = len(others) if sought else 0
            runs += in_full
            runs += [Run(recipe, best, seed) for seed in others] if best is not None and not sought else []
        for run in runs:
            (left if find(run) is None else done).append(config.steps_of(tuning=run.tuning))
        left += [config.steps] * num_later
    return done, left


def prepare_run(
    config: Comparison,
    run: Run,
    task: Task,
    transport: Transport,
    *,
    make: Callable[[TrainConfig, Task, Transport, Path], Trainer] = Trainer,
    out: Path | None = None,
) -> Trainer:
    """The trainer of one run of a recipe on one of the replicas, where it was cut off or at the start.

    Args:
        config: the comparison.
        run: of it.
        task: data and model.
        transport: a fresh one.
        make: makes the trainer.
        out: where the run's folder goes. Default: the comparison's.
    """
    settings = config.run_config(run.recipe, run.lr, run.seed, tuning=run.tuning)
    assert isinstance(settings, TrainConfig)
    folder = run_folder(out or config.out, *run)
    trainer = make(settings, task, transport, folder)
    try:
        trainer.resume()
    except UsageError:
        # A checkpoint of other settings in this place: the run starts afresh and replaces it.
        trainer = make(settings, task, transport, folder)
    transport.gather(b"looked", purpose="control")
    if transport.rank == 0:
        print(
            *(f"{run.recipe}, lr {run.lr:g}, seed {run.seed}: {note}\n" for note in trainer.notes),
            sep="",
            end="",
            flush=True,
        )
        write_json(folder / CONFIG, settings.identity())
    return trainer


def prepare_peer(
    config: Comparison,
    run: Run,
    task: Task,
    transport: Transport,
    *,
    out: Path | None = None,
    stop_after: int | None = None,
) -> PeerTrainer:
    """The trainer of one run of a peer, from its start.

    Args:
        config, run, task, transport, out: as in ``prepare_run``.
        stop_after: a step after which it ends. Default: the last one.
    """
    settings = config.run_config(run.recipe, run.lr, run.seed, tuning=run.tuning)
    assert isinstance(settings, PeerConfig)
    folder = run_folder(out or config.out, *run)
    trainer = PeerTrainer(settings, task, transport, folder, stop_after=stop_after)
    if transport.rank == 0:
        write_json(folder / CONFIG, settings.identity())
    return trainer


def finish_run(trainer: Trainer | PeerTrainer, result: RunResult) -> None:
    """What the first replica does after the last step: drop the checkpoints."""
    if result.finished and trainer.transport.everyone.rank == 0:
        shutil.rmtree(trainer.folder / "checkpoints", ignore_errors=True)


def stopped(config: Comparison) -> StoppedError:
    """The error of a comparison that a signal stopped."""
    return StoppedError(f"stopped; the same command goes on from {config.out}")
