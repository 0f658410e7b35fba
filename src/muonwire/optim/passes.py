"""What goes through each chain in a step, what its updates move, and what an error restores."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim.gradients import wide_gradient
from muonwire.optim.groups import OUTER
from muonwire.optim.kept import SHARED
from muonwire.stages.base import Context, State, total_bytes
from muonwire.stages.chain import Chain
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds
from muonwire.transport.base import SingleReplica, Transport
from muonwire.transport.shards import is_cut_alike, local

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The tensors that go through one chain in one step.

    Of sharded parameters these are this process's shards; only the states hold DTensors.

    Args:
        chain: that they go through.
        weights: that the updates move.
        updates: the chain's input, one for each weight and of its dtype, at least float32.
        states: of the chain's members, one for each weight.
        context: see Context.
        weight_decay: decoupled, times the learning rate.
        params: of the optimizer, one for each weight.
    """

    chain: Chain
    weights: Sequence[Tensor]
    updates: Sequence[Tensor]
    states: Sequence[State]
    context: Context
    weight_decay: float = 0.0
    params: Sequence[Tensor] = ()

    def rounds(self) -> Rounds:
        """The chain's rounds; see Stage.rounds."""
        return self.chain.rounds(self.updates, self.seen, self.states, self.context)

    @cached_property
    def seen(self) -> list[Tensor]:
        """What the stages see as parameters: the weights, in the updates' dtype, which is wider than theirs without masters."""
        return [self._seen(w, u.dtype) for w, u in zip(self.weights, self.updates, strict=True)]

    def _seen(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype is dtype or self.chain.reads_params:
            return weight.to(dtype)
        # It has the shape, and no memory.
        return torch.zeros((), dtype=dtype, device=weight.device).expand(weight.shape)

    def move(self, updates: Sequence[Tensor]) -> None:
        """w ← (1 − lr · weight_decay) w − lr · u, with u the chain's output."""
        lr = self.context.lr
        for weight, update in zip(self.weights, updates, strict=True):
            if self.weight_decay:
                weight.mul_(1 - lr * self.weight_decay)
            weight.add_(update.to(weight.dtype), alpha=-lr)


def inner_passes(optimizer: "ChainOptimizer", *, zeros: bool = False) -> list[Pass]:
    """One pass for each group; groups without anything to move are left out.

    Args:
        optimizer: whose groups they are.
        zeros: put in zeros instead of the gradients, where one is not finite. Default: False.

    Raises:
        UsageError: a gradient is sparse, or cut otherwise than its parameter.
    """
    transport = SingleReplica() if optimizer.local is not None else optimizer.transport
    passes = []
    for group, chain in zip(optimizer.param_groups, optimizer.chains, strict=True):
        talks = transport.world_size > 1 and chain.talks
        members = [
            (p, layout, name)
            for p, layout, name in zip(group["params"], group["layouts"], group["names"], strict=True)
            if p.grad is not None or (talks and p.requires_grad)
        ]
        if any(p.grad is not None and p.grad.is_sparse for p, _, _ in members):
            raise UsageError(f"ChainOptimizer: {group['name']} has a sparse gradient; stages take dense ones")
        for param, _, name in members:
            if param.grad is not None and not is_cut_alike(param.grad, param):
                placements = [getattr(t, "placements", "none: it is whole") for t in (param.grad, param)]
                raise UsageError(
                    f"ChainOptimizer: the gradient of {name} has placements {placements[0]}, the parameter {placements[1]}; cut it "
                    "alike, as grad.redistribute(param.device_mesh, param.placements) does"
                )
        if members:
            passes.append(
                Pass(
                    chain=chain,
                    weights=[local(optimizer.moved_weight(p)) for p, _, _ in members],
                    updates=[wide_gradient(p, zero=zeros) for p, _, _ in members],
                    states=[optimizer.state[p] for p, _, _ in members],
                    context=Context(
                        lr=float(group["lr"]),
                        step=group["step"] + 1,
                        transport=transport,
                        layouts=[MatrixLayout.parse(layout) for _, layout, _ in members],
                        names=[name for _, _, name in members],
                        dtypes=[p.dtype for p, _, _ in members],
                        watch=optimizer.watch,
                        processor=optimizer.processor,
                    ),
                    weight_decay=float(group["weight_decay"]),
                    params=[p for p, _, _ in members],
                )
            )
    return passes


def outer_passes(
    optimizer: "ChainOptimizer",
    *,
    params: Sequence[Tensor] | None = None,
    transport: Transport | None = None,
    step: int | None = None,
) -> list[Pass]:
    """The weight changes Δ = a − w: one pass for all parameters with the same outer chain, in the groups' order.

    Args:
        optimizer: with local steps.
        params: of which parameters. Default: of all that are trained.
        transport: the way to the other replicas. Default: the optimizer's.
        step: how many synchronizations there were, this one included. Default: as the groups have it.
    """
    assert optimizer.local is not None
    chosen = None if params is None else set(params)
    step = optimizer.param_groups[0]["synchronizations"] + 1 if step is None else step
    alike: dict[str, list[tuple[Tensor, str, str]]] = {}
    for group in optimizer.param_groups:
        for param, layout, name, text in zip(
            group["params"], group["layouts"], group["names"], group["outer_chains"], strict=True
        ):
            if param.requires_grad and (chosen is None or param in chosen):
                alike.setdefault(text, []).append((param, layout, name))
    return [
        Pass(
            chain=optimizer.outer[members[0][0]],
            weights=[local(optimizer.state[p][SHARED]) for p, _, _ in members],
            updates=[
                local(optimizer.state[p][SHARED]) - local(optimizer.moved_weight(p)) for p, _, _ in members
            ],
            states=[optimizer.state[p][OUTER] for p, _, _ in members],
            context=Context(
                lr=optimizer.local.outer_lr,
                step=step,
                transport=transport or optimizer.transport,
                layouts=[MatrixLayout.parse(layout) for _, layout, _ in members],
                names=[name for _, _, name in members],
                dtypes=[p.dtype for p, _, _ in members],
                watch=optimizer.watch,
                processor=optimizer.processor_of("outer_processor"),
            ),
            params=[p for p, _, _ in members],
        )
        for members in alike.values()
    ]


def estimate_bytes(optimizer: "ChainOptimizer", *, replicas: int) -> float | None:
    """The sum of the stages' formulas; ChainOptimizer.estimate_bytes documents it."""
    local = optimizer.local
    if replicas == 1:
        return 0.0
    if local is not None and local.growth > 0:
        # The average depends on the length of the run.
        return None
    total = total_bytes(
        chain.estimate_bytes(params, layouts, replicas=replicas)
        for chain, params, layouts in _sent(optimizer)
    )
    if total is None or local is None:
        return total
    return total / (local.initial if optimizer.adapting is None else optimizer.adapting.now)


def _sent(optimizer: "ChainOptimizer") -> Iterator[tuple[Chain, list[Tensor], list[MatrixLayout]]]:
    """The chains that exchange, with the parameters and layouts that go through each."""
    if optimizer.local is not None:
        streaming = optimizer.streaming
        parts = [None] if streaming is None else [streaming.params([f]) for f in streaming.fragments]
        for part in parts:
            for p in outer_passes(optimizer, params=part):
                wholes = [optimizer.state[param][SHARED] for param in p.params]
                yield p.chain, wholes, list(p.context.layouts)
        return
    for group, chain in zip(optimizer.param_groups, optimizer.chains, strict=True):
        trained = [
            (p, text) for p, text in zip(group["params"], group["layouts"], strict=True) if p.requires_grad
        ]
        yield chain, [p for p, _ in trained], [MatrixLayout.parse(text) for _, text in trained]


@contextmanager
def restored_on_error(passes: Sequence[Pass]) -> Iterator[None]:
    """Restore the states if anything is raised within.

    Only members up to the last that talks are copied: those behind it run after all replicas have found that nothing is wrong.
    """
    kept = [
        (
            state,
            {n: copied(state[n], tensors=not stage.replaces_states) for n, stage in members if n in state},
        )
        for p in passes
        if (members := p.chain.before_last_talk)
        for state in p.states
    ]
    try:
        yield
    except BaseException:
        for state, before in kept:
            state.update(before)
        raise


def copied(state: State, *, tensors: bool = True) -> State:
    """A copy of nested states, and with ``tensors`` of their tensors too."""
    return {
        key: copied(value, tensors=tensors)
        if isinstance(value, dict)
        else value.detach().clone()
        if tensors and isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
