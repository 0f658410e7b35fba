"""Replicas as threads that take their local steps together: less work for the interpreter, the same bits."""

import time
from collections import deque
from collections.abc import Sequence

import torch
from typing_extensions import override

from muonwire.optim.stack import Stack, stacks
from muonwire.train.loop import Trainer
from muonwire.transport import Traffic
from muonwire.transport.threads import ThreadTransport

# Fewer steps are not worth the meeting.
FEWEST = 2


class TogetherTrainer(Trainer):
    """A Trainer whose local steps between two synchronizations one replica takes for all, at once, where that changes no bit.

    Steps that synchronize, evaluate, save or compare weights are taken as ever, and so is every step of optimizers that exchange
    in each, and of models that draw random numbers in training, whose order would be another one.
    """

    # Whether training draws random numbers; found out in the first step that this process takes.
    _draws: bool | None = None
    _stack: Stack | None = None
    # The losses and rates of steps that were taken and not reported yet.
    _taken: "deque[tuple[float, float]] | None" = None
    # A step that was found not to be finite, and is left to the replicas.
    _refused = 0

    @override
    def _one_step(self) -> tuple[float, float]:
        if self._taken:
            self.step += 1
            return self._taken.popleft()
        number = self._num_together()
        if number < FEWEST:
            before = None if self._draws is not None else _generators(self.device)
            result = super()._one_step()
            if before is not None:
                now = _generators(self.device)
                self._draws = not all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
            return result
        assert isinstance(self.transport, ThreadTransport)
        self.transport.meet(self, lambda trainers: take(trainers, number))
        return self._one_step()

    def _num_together(self) -> int:
        """How many of the next steps are local ones, after none of which anything else is done."""
        config, optimizer = self.config, self.optimizer
        if (
            self._draws is not False
            or not isinstance(self.transport, ThreadTransport)
            or self.transport.world_size < 2
        ):
            return 0
        if not stacks(optimizer):
            return 0
        number = 0
        while True:
            step = self.step + number + 1
            others = (config.evaluate_every, config.checkpoint_every, config.digest_every)
            if step >= config.steps or step == self._refused or any(n and step % n == 0 for n in others):
                return number
            if optimizer.is_due(ahead=number + 1):
                return number
            number += 1


def _generators(device: torch.device) -> list[torch.Tensor]:
    """States of the generators that a model on the device may draw from."""
    states = [torch.random.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def take(trainers: Sequence[TogetherTrainer], number: int) -> None:
    """So many steps of all trainers, which have come to the same one; fewer where something is not finite.

    Args:
        trainers: of all replicas.
        number: of steps.
    """
    first = trainers[0]
    stack = first._stack
    if stack is None:
        stack = first._stack = Stack([t.optimizer for t in trainers])
    for trainer in trainers:
        trainer._taken = deque()
    for step in range(first.step + 1, first.step + number + 1):
        first.set_rates(step)
        lr = first.optimizer.param_groups[0]["lr"]
        values, times, all_finite = [], [], True
        for trainer in trainers:
            start_s = time.perf_counter()
            value, finite = trainer.gradient(step)
            values.append(value)
            all_finite &= finite
            times.append(time.perf_counter() - start_s)
            trainer.diagnostics.observe(step)
        start_s = time.perf_counter()
        if not all_finite or not stack.step():
            for trainer in trainers:
                trainer._refused = step
                trainer.optimizer.zero_grad()
            break
        optimizer_s = (time.perf_counter() - start_s) / len(trainers)
        for trainer, value, compute_s in zip(trainers, values, times, strict=True):
            trainer.count(Traffic(), value=value, compute_s=compute_s, optimizer_s=optimizer_s)
            assert trainer._taken is not None
            trainer._taken.append((value, lr))
    stack.finish()
