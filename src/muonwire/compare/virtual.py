"""Runs side by side, the replicas of each as threads of one process."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from muonwire.compare.config import Comparison
from muonwire.compare.runs import Run, finish_run, label, pending, prepare_run, stopped
from muonwire.errors import ExchangeError
from muonwire.exchange import Exchange, run_threads
from muonwire.tasks.text import TextTask
from muonwire.train.launch import on_stop_signal, set_threads
from muonwire.train.loop import Trainer


def _one_run(config: Comparison, run: Run) -> bool:
    """What a worker process does for one run; False where it was told to stop."""
    set_threads(os.cpu_count() or 1, config.threads)
    task = TextTask(config.task)
    trainers: list[Trainer] = []

    def replica(rank: int, make_exchange: Callable[[], Exchange]) -> bool:
        trainer = prepare_run(config, run, task, make_exchange())
        trainers.append(trainer)
        result = trainer.run()
        finish_run(run, trainer, result)
        return result.finished

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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, on_stop_signal(stop):
        while runs := pending(config):
            running = {pool.submit(_one_run, config, run): run for run in runs}
            try:
                for future in as_completed(running):
                    if not future.result() or stopping:
                        raise stopped(config)
            except BrokenProcessPool as error:
                if stopping:
                    raise stopped(config) from error
                unfinished = [label(run) for future, run in running.items() if not future.done()]
                raise ExchangeError(
                    f"compare: a process was ended from outside, with {len(unfinished)} runs to go; "
                    "the same command goes on where they were"
                ) from error
            finally:
                for future in running:
                    future.cancel()
