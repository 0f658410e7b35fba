"""Runs side by side, the replicas of each as threads of one process."""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

from muonwire.compare.config import Comparison
from muonwire.compare.progress import comparison_progress
from muonwire.compare.runs import Run, finish_run, pending, prepare_run, stopped
from muonwire.compare.together import TogetherTrainer
from muonwire.errors import ExchangeError, StoppedError
from muonwire.train.launch import on_stop_signal, set_threads, start_method
from muonwire.train.loop import Progress, Trainer
from muonwire.transport import Transport, run_threads

# How often the bar learns of the steps of the runs.
POLL_S = 0.5
# In the shared memory: the run that it is for has no trainer yet.
NOT_BEGUN = -1
# Of glibc's mallopt: from how many heaps on threads get none of their own.
_M_ARENA_MAX = -8

# In a worker process: the steps that each of the runs side by side has come to, in memory that it shares with the others.
_steps: MutableSequence[int] = []


def _share(steps: MutableSequence[int]) -> None:
    global _steps
    _steps = steps
    # By itself every thread gets heaps of its own, which keep what a replica has ever needed at once. Replicas take turns, so that
    # they do not wait for shared ones.
    limit = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if limit is not None:
        limit(_M_ARENA_MAX, 1)


def _one_run(config: Comparison, run: Run, place: int) -> bool:
    """What a worker process does for one run, whose steps it writes to its ``place``; False where it was asked to stop."""
    set_threads(os.cpu_count() or 1, config.threads)
    task = config.task.make()
    trainers: list[Trainer] = []

    def replica(rank: int, make_transport: Callable[[], Transport]) -> bool:
        trainer = prepare_run(config, run, task, make_transport(), make=TogetherTrainer)
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


class Job(NamedTuple):
    """One run of one comparison."""

    config: Comparison
    run: Run

    @property
    def key(self) -> tuple[Path, Run]:
        """What tells it from others."""
        return self.config.out, self.run


def run_jobs(
    left: Callable[[], Iterable[Job]],
    *,
    jobs: int | None,
    modules: Sequence[str],
    at: Callable[[Job, int], object],
    finish: Callable[[Job], object],
    stopped: Callable[[], StoppedError],
    limit_s: float | None = None,
) -> None:
    """Do what is left, in its order, so many runs at a time.

    Args:
        left: what is left by now; it is asked again after each run, since the next rate follows from the last one's loss.
        jobs: runs side by side. Default: the number of cores.
        modules: by name, that are imported once for all processes.
        at: called with a running job and the steps that it has come to.
        finish: called with a finished one.
        stopped: makes the error to raise where the runs were asked to stop.
        limit_s: seconds after which they are. Default: none.

    Raises:
        StoppedError: SIGTERM, Ctrl-C or the limit; every run left a checkpoint.
        ExchangeError: a worker process was ended from outside.
    """
    stopping = False
    began_s = time.monotonic()

    def stop() -> None:
        nonlocal stopping
        stopping = True
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGTERM)

    jobs = jobs or os.cpu_count() or 1
    context = multiprocessing.get_context(start_method(tuple(modules)))
    steps = context.RawArray("q", [NOT_BEGUN] * jobs)
    running: dict[Future[bool], tuple[Job, int]] = {}
    with (
        ProcessPoolExecutor(jobs, mp_context=context, initializer=_share, initargs=(steps,)) as pool,
        on_stop_signal(stop),
    ):
        while True:
            begun = {job.key for job, _ in running.values()}
            free = set(range(jobs)) - {place for _, place in running.values()}
            new = (job for job in left() if job.key not in begun)
            for place, job in zip(sorted(free), new, strict=False):
                steps[place] = NOT_BEGUN
                running[pool.submit(_one_run, job.config, job.run, place)] = (job, place)
            if not running:
                return
            done: set[Future[bool]] = set()
            while not done:
                done, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                for job, place in running.values():
                    if steps[place] != NOT_BEGUN:
                        at(job, steps[place])
                if limit_s is not None and not stopping and time.monotonic() - began_s > limit_s:
                    stop()
            for future in done:
                job, _ = running.pop(future)
                try:
                    finished = future.result()
                except BrokenProcessPool as error:
                    if stopping:
                        raise stopped() from error
                    raise ExchangeError(
                        f"compare: the process of {job.run} was ended from outside; the same command goes on where it was"
                    ) from error
                if finished:
                    finish(job)
                if stopping or not finished:
                    stop()
                    raise stopped()


def run_virtual(config: Comparison) -> None:
    """All pending runs, ``jobs`` at a time.

    Raises:
        StoppedError: SIGTERM or Ctrl-C; every run left a checkpoint.
        ExchangeError: a worker process was ended from outside.
    """
    with comparison_progress(config) as shown:
        run_jobs(
            # What is left grows as rates are found, so that a recipe is done before the next one begins.
            lambda: [Job(config, run) for run in pending(config, peers=False)],
            jobs=config.jobs,
            modules=config.task.modules,
            at=lambda job, step: shown.at(job.run, step),
            finish=lambda job: shown.finish(job.run),
            stopped=lambda: stopped(config),
        )
