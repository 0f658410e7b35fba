"""The runs of a comparison: where each lives, which are done, and the worker that does the others."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muonwire.compare.config import Comparison
from muonwire.errors import StoppedError, UsageError
from muonwire.exchange import Exchange
from muonwire.tasks.text import TextTask
from muonwire.train.checkpoint import write_json
from muonwire.train.config import TrainConfig
from muonwire.train.launch import on_stop_signal, process_group, set_threads
from muonwire.train.loop import RESULT, RunResult, Trainer
from muonwire.train.progress import progress_bar
from muonwire.train.single import CONFIG

Result = dict[str, Any]
Run = tuple[str, float, int]  # recipe, learning rate, seed


def run_folder(out: Path, recipe: str, lr: float, seed: int) -> Path:
    """Where a run lives: readable, and distinct for recipes that differ in their options only."""
    slug = re.sub(r"[^\w.=-]+", "_", recipe).strip("_")[:60]
    if slug != recipe:
        slug += "-" + hashlib.blake2b(recipe.encode(), digest_size=3).hexdigest()
    return out / "runs" / slug / f"lr={lr:g},seed={seed}"


def read_result(folder: Path, config: TrainConfig, *, replicas: int) -> Result | None:
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


def best_lr(
    config: Comparison, recipe: str, find: Callable[[str, float, int], Result | None]
) -> float | None:
    """The rate of the lowest final evaluation loss with the first seed; None where no run reached one."""
    scored = [
        (result["final_eval_loss"], lr)
        for lr in config.lr_grid
        if (result := find(recipe, lr, config.seeds[0])) is not None and result["final_eval_loss"] is not None
    ]
    return min(scored)[1] if scored else None


def find_result(config: Comparison) -> Callable[[str, float, int], Result | None]:
    """A look-up of finished runs."""

    def find(recipe: str, lr: float, seed: int) -> Result | None:
        return read_result(
            run_folder(config.out, recipe, lr, seed),
            config.run_config(recipe, lr, seed),
            replicas=config.replicas,
        )

    return find


def pending(config: Comparison) -> list[Run]:
    """What is left to run now: the grid with the first seed, then the best rates with the other seeds."""
    find = find_result(config)
    grid = [(r, lr, config.seeds[0]) for r in config.recipes for lr in config.lr_grid]
    left = [run for run in grid if find(*run) is None]
    if left:
        return left
    chosen = [(recipe, best_lr(config, recipe, find)) for recipe in config.recipes]
    rest = [(r, lr, seed) for r, lr in chosen if lr is not None for seed in config.seeds[1:]]
    return [run for run in rest if find(*run) is None]


def prepare_run(config: Comparison, run: Run, task: TextTask, exchange: Exchange) -> Trainer:
    """The trainer of one run on one of the replicas, where it was cut off or at the start."""
    recipe, lr, seed = run
    settings = config.run_config(recipe, lr, seed)
    folder = run_folder(config.out, recipe, lr, seed)
    trainer = Trainer(settings, task, exchange, folder)
    try:
        trainer.resume()
    except UsageError:
        # A checkpoint of other settings in this place: the run starts afresh and replaces it.
        trainer = Trainer(settings, task, exchange, folder)
    exchange.gather(b"looked", purpose="control")
    if exchange.rank == 0:
        write_json(folder / CONFIG, settings.identity())
    return trainer


def finish_run(run: Run, trainer: Trainer, result: RunResult) -> None:
    """What the first replica does after the last step: drop the checkpoints, tell the outcome."""
    if not result.finished or trainer.exchange.rank:
        return
    shutil.rmtree(trainer.folder / "checkpoints", ignore_errors=True)
    loss = "diverged" if result.final_eval_loss is None else f"evaluation loss {result.final_eval_loss:.4f}"
    print(
        f"{label(run)}: {loss}, {result.bits_per_parameter_step:.3g} bit per parameter and step", flush=True
    )


def label(run: Run) -> str:
    """How messages name a run."""
    recipe, lr, seed = run
    return f"{recipe} lr={lr:g} seed={seed}"


def stopped(config: Comparison) -> StoppedError:
    """What a comparison that was told to stop raises."""
    return StoppedError(f"stopped; the same command goes on from {config.out}")


def worker(config: Comparison) -> None:
    """All pending runs, one after the other, on one of the replicas."""
    task = TextTask(config.task)
    with process_group() as make_exchange:
        set_threads(config.replicas, config.threads)
        while runs := pending(config):
            for run in runs:
                trainer = prepare_run(config, run, task, make_exchange())
                first = trainer.exchange.rank == 0
                with (
                    on_stop_signal(trainer.request_stop),
                    progress_bar(label(run), enabled=first, lines=False) as show,
                ):
                    result = trainer.run(show)
                finish_run(run, trainer, result)
                if not result.finished:
                    raise stopped(config)
            # Everyone has seen the last result before anyone looks at what is left.
            make_exchange().gather(b"done", purpose="control")
