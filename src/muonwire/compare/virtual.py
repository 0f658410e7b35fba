"""Runs side by side, the replicas of each as threads of one process."""

import multiprocessing
import os
import signal
from collections.abc import Callable, MutableSequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from muonwire.compare.config import Comparison
from muonwire.compare.progress import comparison_progress
from muonwire.compare.runs import Run, finish_run, pending, prepare_run, stopped
from muonwire.errors import ExchangeError
from muonwire.train.launch import on_stop_signal, set_threads, start_method
from muonwire.train.loop import Progress, Trainer
from muonwire.transport import Transport, run_threads

# How often the bar learns of the steps of the runs.
POLL_S = 0.5
# In the shared memory: the run that it is for has no trainer yet.
NOT_BEGUN = -1

# In a worker process: the steps that each of the runs side by side has come to, in memory that it shares with the others.
_steps: MutableSequence[int] = []


def _share(steps: MutableSequence[int]) -> None:
    global _steps
    _steps = steps


def _one_run(config: Comparison, run: Run, place: int) -> bool:
    """What a worker process does for one run, whose steps it writes to its ``place``; False where it was asked to stop."""
    set_threads(os.cpu_count() or 1, config.threads)
    task = config.task.make()
    trainers: list[Trainer] = []

    def replica(rank: int, make_transport: Callable[[], Transport]) -> bool:
        trainer = prepare_run(config, run, task, make_transport())
        trainers.append(trainer)
        if rank == 0:
            _steps[place] = trainer.step
        result = trainer.run(note if rank == 0 else None)
        finish_run(trainer, result)
        return result.finished

    def note(progress: Progress) -> None:
        _steps[place] = progress.step

    def stop() -> None:
        for trainer in trainers:
            trainer.request_stop()

    with on_stop_signal(stop):
        return all(run_threads(replica, replicas=config.replicas))


def run_virtual(config: Comparison) -> None:
    """All pending runs, ``jobs`` at a time.

    Raises:
        StoppedError: SIGTERM or Ctrl-C; every run left a checkpoint.
        ExchangeError: a worker process was ended from outside.
    """
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    jobs = config.jobs or os.cpu_count() or 1
    context = multiprocessing.get_context(start_method(config.task.modules))
    steps = context.RawArray("q", [NOT_BEGUN] * jobs)
    running: dict[Future[bool], tuple[Run, int]] = {}
    with (
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_share, initargs=(steps,)) as pool,
        on_stop_signal(stop),
        comparison_progress(config) as shown,
    ):
        while True:
            # What is left grows as rates are found, so that a recipe is done before the next one begins.
            begun = {run for run, _ in running.values()}
            free = set(range(jobs)) - {place for _, place in running.values()}
            for run, place in zip(
                (run for run in pending(config, peers=False) if run not in begun), sorted(free), strict=False
            ):
                steps[place] = NOT_BEGUN
                running[pool.submit(_one_run, config, run, place)] = (run, place)
            if not running:
                return
            done: set[Future[bool]] = set()
            while not done:
                done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for run, place in running.values():
                    if steps[place] != NOT_BEGUN:
                        shown.at(run, steps[place])
            for future in done:
                run, _ = running.pop(future)
                try:
                    finished = future.result()
                except BrokenProcessPool as error:
                    if stopping:
                        raise stopped(config) from error
                    raise ExchangeError(
                        f"compare: the process of {run} was ended from outside; the same command goes on where it was"
                    ) from error
                if stopping or not finished:
                    stop()
                    raise stopped(config)
                shown.finish(run)
