"""Local steps of several replicas of one process: one pass over tensors that hold all of them, with the bits of passes alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muonwire.optim.gradients import are_finite
from muonwire.optim.passes import Pass, inner_passes
from muonwire.stages.base import Stage, State

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer

# Entries that one instruction may treat; behind the last whole one of a tensor, others are taken, which may round otherwise.
VECTOR = 64


def stacks(optimizer: "ChainOptimizer") -> bool:
    """Whether the optimizer's local steps can be taken with those of others: its own chains, on whole float32 weights on a CPU."""
    if optimizer.local is None or optimizer.streaming or optimizer.adapting or optimizer.around is not None:
        return False
    if optimizer.look_ahead or optimizer.buffers() or optimizer.lifecycle.nonfinite == "skip":
        return False
    if optimizer.transport.shards_inside or optimizer.transport is not optimizer.transport.everyone:
        return False
    plain = all(
        p.dtype == torch.float32 and p.device.type == "cpu" and p.is_contiguous() for p in optimizer.trained()
    )
    return plain and torch.get_num_threads() == 1


class Stack:
    """The weights, and the states of stages that work entry by entry, of all replicas, in tensors whose first dimension is theirs.

    The optimizers' own tensors become views of these, so that steps of their own go on with them.

    Args:
        optimizers: alike, one a replica, for each of which ``stacks`` holds.
    """

    @torch.no_grad()
    def __init__(self, optimizers: Sequence["ChainOptimizer"]) -> None:
        self._optimizers = optimizers
        self._params = [optimizer.trained() for optimizer in optimizers]
        self._place = {param: i for i, param in enumerate(self._params[0])}
        self._weights: dict[int, Tensor] = {}
        for i, alike in enumerate(zip(*self._params, strict=True)):
            if _whole_vectors(alike[0]):
                self._weights[i] = whole = torch.stack([p.detach() for p in alike])
                for param, view in zip(alike, whole, strict=True):
                    param.data = view
        # Of states: by where their first tensor lies.
        self._whole: dict[tuple[int, ...], Tensor] = {}
        self._taken = 0

    @torch.no_grad()
    def step(self) -> bool:
        """A local step of every replica, with the gradients that its parameters hold, which are then none.

        Returns:
            False where a gradient is missing or not finite; then nothing has changed.
        """
        gradients = [p.grad for params in self._params for p in params]
        known = [g for g in gradients if g is not None]
        if len(known) < len(gradients) or not are_finite(known):
            return False
        for p in inner_passes(self._optimizers[0]):
            self._pass(p)
        for params in self._params:
            for param in params:
                param.grad = None
        self._optimizers[0]._count(step=1)
        self._taken += 1
        return True

    def finish(self) -> None:
        """Let the optimizers know what they hold, after the last of some steps."""
        for optimizer in self._optimizers:
            optimizer._gradients.count += self._taken
            optimizer.transport.step = optimizer._gradients.count
            if optimizer is not self._optimizers[0]:
                optimizer._count(step=self._taken)
            optimizer.record_weights()
        self._taken = 0

    def _pass(self, first: Pass) -> None:
        """One group of all replicas; ``first`` is the first one's."""
        places = [self._place[param] for param in first.params]
        params = [[params[i] for i in places] for params in self._params]
        updates = [
            torch.stack([p.grad for p in alike if p.grad is not None]) for alike in zip(*params, strict=True)
        ]
        whole = all(i in self._weights for i in places)
        weights = [self._weights[i] for i in places] if whole else []
        states = [
            [optimizer.state[p] for p in own] for optimizer, own in zip(self._optimizers, params, strict=True)
        ]
        for name, stage in first.chain.members:
            own = [[s.get(name, {}) for s in of_one] for of_one in states]
            if whole and stage.elementwise and not stage.replaces_states and not stage.reads_params:
                updates = self._apply_once(stage, updates, weights, own, first)
            else:
                made = [
                    stage.apply(
                        [u[r] for u in updates], [p.detach() for p in params[r]], own[r], first.context
                    )
                    for r in range(len(params))
                ]
                updates = [torch.stack(of_one) for of_one in zip(*made, strict=True)]
        if whole:
            replace(first, weights=weights).move(updates)
        else:
            for r, of_one in enumerate(params):
                replace(first, weights=[p.detach() for p in of_one]).move([u[r] for u in updates])

    def _apply_once(
        self, stage: Stage, updates: list[Tensor], weights: list[Tensor], own: list[list[State]], first: Pass
    ) -> list[Tensor]:
        states = [self._state(of_all) for of_all in zip(*own, strict=True)]
        made = stage.apply(updates, weights, states, first.context)
        for state, of_all in zip(states, zip(*own, strict=True), strict=True):
            numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for one in of_all:
                one.update(numbers)
        return made

    def _state(self, states: Sequence[State]) -> State:
        """One state of all replicas': tensors hold those of all, numbers are the same in all."""
        return {
            key: self._one([s[key] for s in states]) if isinstance(value, Tensor) else value
            for key, value in states[0].items()
        }

    def _one(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor of which these are views; they become so."""
        key = tuple(t.data_ptr() for t in tensors)
        if key not in self._whole:
            whole = torch.stack(list(tensors))
            for tensor, view in zip(tensors, whole, strict=True):
                tensor.set_(view)
            key = tuple(t.data_ptr() for t in tensors)
            self._whole[key] = whole
        return self._whole[key]


def _whole_vectors(tensor: Tensor) -> bool:
    return tensor.numel() % VECTOR == 0
