"""What inputs that train share: runs side by side, and the course of the learning rate."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

from muonwire.optim import ChainOptimizer
from muonwire.tasks import TextSettings
from muonwire.train.launch import start_method
from muonwire.train.schedule import lr_factor

C = TypeVar("C")
R = TypeVar("R")


def side_by_side(run: Callable[[C], R], cases: Sequence[C], *, quick: bool) -> list[R]:
    """What ``run`` gives for each case, one thread each, as many at a time as there are cores; one after the other where quick.

    Args:
        run: a function of a module, or a partial of one, so that a process can be given it.
        cases: its arguments.
        quick: whether starting processes would take longer than the runs.
    """
    if quick:
        return [run(case) for case in cases]
    with ProcessPoolExecutor(
        os.cpu_count(),
        mp_context=multiprocessing.get_context(start_method(TextSettings.modules)),
        initializer=torch.set_num_threads,
        initargs=(1,),
    ) as pool:
        return list(pool.map(run, cases))


def rate_course(optimizer: ChainOptimizer, *, steps: int) -> Callable[[int], None]:
    """A function that sets the learning rates for a step, the first being 1.

    They rise over a twentieth of the steps to what they are now, then fall along half a cosine to a tenth of it.
    """
    peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        factor = lr_factor(step, steps=steps, warmup_steps=max(steps // 20, 1), kind="cosine", floor=0.1)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor

    return set_rates
