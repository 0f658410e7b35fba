"""ChainOptimizer: the one optimizer type. Its parameter groups pass through chains of stages, alone or with other replicas."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import NonFiniteUpdateError
from muonwire.optim import groups, inside, saved
from muonwire.optim.adapting import INTERVALS, Adapting, first_intervals
from muonwire.optim.agreement import (
    Agreement,
    Shaken,
    begin,
    ensure_agreement,
    floating_buffers,
)
from muonwire.optim.describe import describe
from muonwire.optim.exchanging import averaged_buffers, exchange, exchange_changes, shake_hands, step_alone
from muonwire.optim.fragments import FRAGMENTS, first_counts
from muonwire.optim.fresh import fresh_state
from muonwire.optim.gradients import GradientCount, find_problem, not_finite, unscale
from muonwire.optim.kept import (
    MASTER,
    SHARED,
    ChangeDetector,
    copy_out,
    holding_shared,
    unsent,
)
from muonwire.optim.passes import estimate_bytes, inner_passes
from muonwire.optim.settings import Lifecycle, LocalSteps
from muonwire.optim.shards import transport_for
from muonwire.optim.streaming import Streaming
from muonwire.polar import Processor, find_processor
from muonwire.polar.processor import named_processor
from muonwire.stages.base import Stage, Watch
from muonwire.stages.chain import Chain
from muonwire.transport.base import Flag, SingleReplica, Transport
from muonwire.transport.shards import local, reshard


class ChainOptimizer(torch.optim.Optimizer):
    """An optimizer out of stages: p ← (1 − lr · weight_decay) p − lr · chain(gradient).

    A step checks that the gradients are finite and that nobody else has changed the weights, sends all groups through their chains
    with shared messages, and only then moves weights: a step that raises has changed nothing. With ``local``, replicas step alone
    and exchange the changes of their weights through the groups' outer chains every so many steps.

    A parameter without a gradient is left out of the step, as in torch.optim; where there are other replicas and the chain
    talks to them, a missing gradient counts as zero instead, since all replicas must send the same tensors.

    ``state[param]`` holds the chain's states under its members' names and, where they are kept, "master" (the float32 copy of a
    16-bit weight), "shared" (the weight that all replicas agree on), "outer" (the outer chain's states), "around" (the state of a
    wrapped optimizer), "fragment" (which one it belongs to, and what is in flight) and "held" (samples of the weight, by which
    changes from outside are noticed).

    Args:
        params: parameters, or group dicts as in torch.optim. A group may hold, besides ``lr`` and ``weight_decay``: ``chain``
            (a Stage), ``outer_chain`` (a Stage that exchanges; needed with ``local``), ``name``, ``names`` (one a parameter)
            and ``layouts`` (one text a parameter, such as "matrix", "conv", "batch" or "matrix/3"; default: "matrix").
        chain: the chain of groups that have none of their own.
        lr: learning rate.
        weight_decay: decoupled, as in AdamW. Default: 0.
        transport: the way to the other replicas. Default: one replica.
        local: how long replicas step alone. Default: they exchange in every step.
        look_ahead: path in a parameter's state to what this replica has not sent yet, δ, such as ("exchange", "residual"). Between
            steps the parameters then hold θ − lr · sign(δ), with θ the shared weights, so that gradients are taken at weights moved
            by what is not sent yet (Psyche's distro.rs). Default: none; they hold θ.
        around: an optimizer that takes the local steps in place of the groups' chains; its groups are this optimizer's.
        model: whose floating buffers are compared at the start and averaged at synchronizations, and whose modules gather weights
            anew after these have moved, where they are sharded; local steps with sharded weights need it. Default: none.
        lifecycle: see Lifecycle. Default: its defaults.

    Raises:
        UsageError: a group without a chain, a negative rate or decay, layouts or names that do not match the parameters, parameters
            on the meta device, or sharded ones that a stage cannot take.

    >>> from muonwire import stages
    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = ChainOptimizer([weight], chain=stages.chain(stages.Momentum(), stages.Polar()), lr=0.1)
    >>> print(optimizer)  # doctest: +ELLIPSIS
    ChainOptimizer (1 replica; polar factors as on ... processors: ...)
      group 0: 1 tensor, 4 parameters, lr=0.1, weight_decay=0: momentum(beta=0.95, nesterov=True, form=ema) → polar(auto)
    """

    # Passed to the stages; see Context.
    watch: Watch | None = None
    # False where synchronize() is called by somebody else, who knows which replicas are there; see Elastic.
    synchronizes: bool = True
    # Called right before an exchange and right after the weights have moved by it.
    before_exchange: Callable[[], None] = staticmethod(lambda: None)
    after_exchange: Callable[[], None] = staticmethod(lambda: None)
    # GradScaler then passes its scale and what it found, instead of leaving out the step on one replica alone.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        chain: Stage | None = None,
        lr: float,
        weight_decay: float = 0.0,
        transport: Transport | None = None,
        local: LocalSteps | None = None,
        look_ahead: Sequence[str] = (),
        around: torch.optim.Optimizer | None = None,
        model: nn.Module | None = None,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        self.transport = transport or SingleReplica()
        self.local = local
        self.lifecycle = lifecycle or Lifecycle()
        self.look_ahead = tuple(look_ahead)
        self.around = around
        self._model = model
        self._default_chain = chain
        self._chains: list[Chain] = []
        self.outer: dict[Tensor, Chain] = {}
        self._gradients = GradientCount()
        self.changes = ChangeDetector()
        self.agreement = Agreement()
        self._failure: str | None = None
        # Sends and merges fragments, where they synchronize at different times or travel while the replica goes on.
        self.streaming = Streaming(self) if local is not None and local.streams else None
        # Changes the interval, where that is no fixed number.
        self.adapting = Adapting(self) if local is not None and local.adapts else None
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if around is not None:
            # Schedulers and the wrapped optimizer see the same groups.
            for theirs, mine in zip(around.param_groups, self.param_groups, strict=True):
                theirs.update(mine)
            self.param_groups = around.param_groups
        if self.streaming is not None:
            self.streaming.assign()
        begin(self, model)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for what it may hold.

        Raises:
            UsageError: see the class.
        """
        index = len(self.param_groups)
        first = self.param_groups[0] if self.param_groups else {}
        group = {**self.defaults, **groups.completed(param_group, index=index, first=first)}
        params = group["params"]
        stage = group.pop("chain", None) or self._default_chain
        if self.around is not None:
            members, group["chain"] = Chain([]), type(self.around).__name__
        else:
            members = groups.as_chain(stage, index=index, what="chain", remedy="to it or to the optimizer")
            group["chain"] = str(members)
        outer: list[Chain] = []
        given = group.pop("outer_chain", None)
        if self.local is not None:
            outer = groups.outer_chains(given, index=index, count=len(params))
            group |= {"outer_chains": [str(c) for c in outer], "outer_processor": None}
            if self.adapting is not None:
                group[INTERVALS] = first.get(INTERVALS) or first_intervals(self.local)
            if self.streaming is not None:
                group[FRAGMENTS] = first.get(FRAGMENTS) or first_counts(self.local)
        groups.check(group)
        self._fit_transport([*self.param_groups, group])
        self.outer |= dict(zip(params, outer, strict=False))
        # States exist from the start, so that a checkpoint taken before the first step can be loaded.
        layouts = zip(params, group["layouts"], strict=True)
        fresh = {p: fresh_state(self, p, members, layout) for p, layout in layouts if p.requires_grad}
        super().add_param_group(group)
        self._chains.append(members)
        self.state.update(fresh)
        self.agreement.reached = False
        self.record_weights()

    def _fit_transport(self, param_groups: Sequence[dict[str, Any]]) -> None:
        self.transport = transport_for(
            param_groups,
            self.transport,
            streams=self.streaming is not None,
            unseen=self._model is None and (self.local is not None or bool(self.look_ahead)),
        )

    def keeps_master(self, param: Tensor) -> bool:
        """Whether a float32 copy of a 16-bit weight takes the updates."""
        narrow = param.element_size() < 4
        return narrow and self.lifecycle.masters and self.around is None and not self.look_ahead

    def trained(self) -> list[Tensor]:
        """The parameters that are trained; states that are missing are made."""
        params = []
        for group, members in zip(self.param_groups, self._chains, strict=True):
            for param, layout in zip(group["params"], group["layouts"], strict=True):
                if param.requires_grad:
                    if param not in self.state:
                        # It was frozen.
                        self._fit_transport(self.param_groups)
                        self.state[param] = fresh_state(self, param, members, layout)
                    params.append(param)
        return params

    def moved_weight(self, param: Tensor) -> Tensor:
        """The tensor that the chain's updates move: the parameter, or a copy that is kept of it."""
        state = self.state[param]
        kept: Tensor | None = state.get(SHARED if self.look_ahead else MASTER)
        return param.detach() if kept is None else kept

    def shared_weight(self, param: Tensor) -> Tensor:
        """The weight that all replicas agree on; ``param`` itself where it never departs from it."""
        kept: Tensor | None = self.state[param].get(SHARED)
        return param.detach() if kept is None else kept

    def named_parameters(self) -> list[tuple[str, Tensor]]:
        """The trained parameters of all groups with their names."""
        return [
            (name, param)
            for group in self.param_groups
            for name, param in zip(group["names"], group["params"], strict=True)
            if param.requires_grad
        ]

    @property
    def chains(self) -> list[Chain]:
        """The groups' chains, in order."""
        return list(self._chains)

    @property
    def processor(self) -> Processor:
        """The class that polar factors follow: what the replicas agreed on, else that of the parameters' device."""
        return self.processor_of("processor")

    def processor_of(self, key: str) -> Processor:
        """The class that the groups hold under ``key``, else that of the parameters' device."""
        for group in self.param_groups:
            if group.get(key) is not None:
                return named_processor(group[key])
        return find_processor(next(p.device for group in self.param_groups for p in group["params"]))

    @property
    def num_steps(self) -> int:
        """Steps taken."""
        return int(self.param_groups[0]["step"])

    @property
    def skipped_steps(self) -> int:
        """Steps left out because something was not finite."""
        return int(self.param_groups[0]["skipped_steps"])

    @property
    def steps_alone(self) -> int:
        """How many local steps this replica has taken since the last synchronization, of the fragment that waits for longest."""
        return int(self.param_groups[0]["step"] - self.param_groups[0]["synchronized_step"])

    @property
    def last_synchronized(self) -> int:
        """The step of the last synchronization, of any fragment."""
        last = self.param_groups[0]["synchronized_step"] if self.streaming is None else self.streaming.last
        return int(last)

    def is_due(self, *, ahead: int = 0) -> bool:
        """Whether replicas with local steps synchronize after ``ahead`` more of them, or send a fragment."""
        if self.streaming is not None:
            return bool(self.streaming.due(ahead=ahead))
        steps, alone = self.num_steps + ahead, self.steps_alone + ahead
        interval = None if self.adapting is None else self.adapting.now
        return self.local is not None and self.local.due(local_step=steps, alone=alone, interval=interval)

    def _count(self, **by: int) -> None:
        """Advance the counters, which are the same in all groups."""
        for group in self.param_groups:
            for key, number in by.items():
                group[key] += number

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all groups; with local steps, and a synchronization where it is due.

        Args:
            closure: as in torch.optim: evaluated with gradients on, its loss is returned.

        Raises:
            NonFiniteUpdateError: a gradient, an update, or the loss that the training loop saw, is not finite on some replica;
                raised on all of them before weights or states have changed. With local steps it is raised in the step that
                synchronizes next; the step of the replica in question is left out.
            ExchangeError: the replicas are out of step, or their parameters or chains differ.
            DivergedReplicasError: the replicas' weights or buffers differ at the start, or were changed from outside and not alike.
            ReplicaLostError: a replica stopped answering.
            PayloadError: a replica sent a payload that does not decode.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self.trained()
        overflowed = unscale(params, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        self._gradients.take(params)
        self.transport.step = self._gradients.count
        if overflowed:
            problem: str | None = "a scaled gradient overflowed"
        elif Flag.DIVERGED in self.transport.requested and self._failure is None:
            problem = "the loss, or its gradient, is not finite"
        else:
            problem = find_problem(self.named_parameters(), self.changes.ask(params))
        ensure_agreement(self, params)
        problem, overflowed = inside.average(self, params, problem, overflowed=overflowed)
        try:
            if self.local is not None:
                self._step_alone(problem, skips=overflowed or self.lifecycle.nonfinite == "skip")
            else:
                self._step_together(problem)
        except NonFiniteUpdateError:
            # A scaler found an overflow on another replica: this one skips the step too.
            if self.lifecycle.nonfinite != "skip" and not hasattr(self, "found_inf"):
                raise
            self._count(skipped_steps=1)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; gradients that no step has used count as a skipped step, which the other replicas must skip too."""
        zero = super().zero_grad
        self._gradients.discard(self.trained(), lambda: zero(set_to_none))

    def _talks(self) -> bool:
        chains = self.outer.values() if self.local else self._chains
        return self.transport.world_size > 1 and any(members.talks for members in chains)

    def _step_together(self, problem: str | None) -> None:
        """Send all groups through their chains, with the other replicas."""
        if problem is not None and not self._talks():
            raise self._not_finite(problem)
        if problem is not None:
            # The other replicas wait for this message: it holds zeros, and its header says why.
            self.transport.requested |= Flag.DIVERGED
        self.transport.settings = groups.rates(self.param_groups)
        self.before_exchange()
        exchange(self, inner_passes(self, zeros=problem is not None), problem)
        self._show_weights()
        self._count(step=1)
        self.record_weights()
        self.after_exchange()

    def _step_alone(self, problem: str | None, *, skips: bool) -> None:
        """A local step, and a synchronization where it is due."""
        assert self.local is not None
        if skips:
            self.transport.requested &= ~Flag.DIVERGED
        elif problem is not None:
            if not self._talks():
                raise self._not_finite(problem)
            self._failure = f"{problem} in step {self._gradients.count}"
            self.transport.requested |= Flag.DIVERGED
            warnings.warn(
                f"ChainOptimizer: {problem}; this replica leaves step {self._gradients.count} out, and all replicas raise "
                "NonFiniteUpdateError when they synchronize next",
                stacklevel=4,
            )
        self.transport.settings = ""
        due = self.synchronizes and self.streaming is None and self.is_due(ahead=1)
        shaken = shake_hands(self) if due else Shaken()
        if problem is not None:
            self._count(skipped_steps=1)
        elif self.around is not None:
            self.around.step()
        else:
            step_alone(self)
            self._show_weights()
        self._count(step=1)
        self.record_weights()
        if due:
            exchange_changes(self, shaken)
        elif self.streaming is not None and self.synchronizes:
            self.streaming.advance()

    def _show_weights(self) -> None:
        """Copy what the chains have moved into the parameters, where that is a copy of them."""
        params = self.trained()
        copy_out(params, self.state, SHARED if self.look_ahead else MASTER)
        if self.look_ahead:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.requires_grad:
                        lead = unsent(self.state[param], self.look_ahead).sign().to(param.dtype)
                        local(param).sub_(lead, alpha=float(group["lr"]))

    def _not_finite(self, problem: str) -> NonFiniteUpdateError:
        self._failure = None
        self.transport.requested &= ~Flag.DIVERGED
        return not_finite(problem, step=self._gradients.count, rank=self.transport.rank)

    @property
    def synchronized(self) -> bool:
        """Whether the parameters hold the shared weights right now."""
        return all(torch.equal(local(p), local(self.shared_weight(p)).to(p.dtype)) for p in self.trained())

    @torch.no_grad()
    def synchronize(self) -> None:
        """Bring all replicas to the same weights and floating buffers; all call it together.

        With local steps the changes of the weights since the last synchronization are exchanged, however few, of all fragments;
        what is in flight is merged before. Without, the weights are the same already, and only buffers such as BatchNorm's are
        averaged. If it raises, nothing shared has changed, and this replica's own local steps stand.

        Raises:
            ExchangeError, DivergedReplicasError, ReplicaLostError, PayloadError: as ``step`` does.
        """
        if self.local is None and (self.transport.world_size == 1 or not self.buffers()):
            return
        self.transport.step = self._gradients.count
        ensure_agreement(self, self.trained())
        if self.streaming is not None:
            # Where replicas come and go, those that are due; see Elastic.
            self.streaming.synchronize(only_due=not self.synchronizes)
            return
        shaken = shake_hands(self)
        if self.local is not None and self.steps_alone:
            exchange_changes(self, shaken)
        else:
            for buffer, mean in averaged_buffers(self, shaken):
                buffer.copy_(mean)

    def buffers(self) -> list[tuple[str, Tensor]]:
        """The model's floating buffers that are averaged over the replicas."""
        return floating_buffers(self._model, exclude=self.lifecycle.exclude_buffers)

    def estimate_bytes(self, *, replicas: int) -> float | None:
        """Bytes that each replica sends per step, on average, by the stages' formulas.

        Not counted are the frames of messages, 16 bytes each, the comparisons at the start, and a few bytes a synchronization.

        Args:
            replicas: how many would train together; one sends nothing.

        Returns:
            Bytes, or None where a stage that talks has no formula, or the interval grows. An interval that follows the link, or a
            record, counts as what it is at present.
        """
        return estimate_bytes(self, replicas=replicas)

    def shared_weights(self) -> AbstractContextManager[None]:
        """Within the block the parameters hold the weights that all replicas share, for evaluation and comparison."""
        return holding_shared(self.trained(), self.state, self._reshard)

    def shared(self) -> list[tuple[str, Tensor]]:
        """The shared weights of all trained parameters, by name."""
        return [(name, self.shared_weight(param)) for name, param in self.named_parameters()]

    def record_weights(self) -> None:
        """Remember what the parameters hold now; later changes by others are noticed."""
        self._reshard()
        self.changes.record(self.trained(), self.state, in_states=not self.transport.shards_inside)

    def _reshard(self) -> None:
        """The next forward pass sees what the shards hold now; see ``reshard``."""
        if self.transport.shards_inside and self._model is not None:
            reshard(self._model)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; what is in flight is waited for, and its result is part of the state until it is merged."""
        if self.streaming is not None:
            self.streaming.land()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, matching parameters by name and shape; states get this optimizer's dtypes.

        Raises:
            UsageError: the state belongs to other parameters, shapes, chains or another kind of optimizer; nothing has changed.
        """
        if self.streaming is not None:
            self.streaming.land()
        saved.load(self, super().load_state_dict, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        if self.streaming is not None:
            self.streaming.land()
        own = "transport local lifecycle look_ahead around outer changes agreement streaming adapting"
        private = "_model _default_chain _chains _gradients _failure"
        return {
            **super().__getstate__(),
            **{name: getattr(self, name) for name in f"{own} {private}".split()},
        }

    def __repr__(self) -> str:
        return describe(self)
