"""Runs side by side, the replicas of each as threads of one process."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from muonwire.compare.config import Comparison
from muonwire.compare.runs import Run, finish_run, pending, prepare_run, stopped
from muonwire.errors import ExchangeError
from muonwire.exchange import Exchange, run_threads
from muonwire.tasks import make_task
from muonwire.train.launch import on_stop_signal, set_threads, start_method
from muonwire.train.loop import Trainer


def _one_run(config: Comparison, run: Run) -> bool:
    """What a worker process does for one run; False where it was told to stop."""
    set_threads(os.cpu_count() or 1, config.threads)
    task = make_task(config.task_settings)
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
    context = multiprocessing.get_context(start_method())
    running: dict[Future[bool], Run] = {}
    with ProcessPoolExecutor(jobs, mp_context=context) as pool, on_stop_signal(stop):
        while True:
            # What is left grows as rates are found, so that a recipe is done before the next one begins.
            left = [run for run in pending(config) if run not in running.values()]
            for run in left[: jobs - len(running)]:
                running[pool.submit(_one_run, config, run)] = run
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
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
