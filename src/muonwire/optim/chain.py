"""ChainOptimizer: a torch optimizer whose parameter groups each pass through a chain of stages."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import NonFiniteUpdateError, UsageError
from muonwire.polar import Processor, find_processor
from muonwire.polar.processor import named_processor, slowest
from muonwire.stages.base import Context, Stage, State, Watch
from muonwire.stages.chain import Chain, chain
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds, drive
from muonwire.transport.base import Flag, SingleReplica, Transport
from muonwire.transport.digest import check_agreement


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """One group in one step: its parameters, and its way through its chain."""

    params: Sequence[Tensor]
    rounds: Rounds
    lr: float
    weight_decay: float

    def move_weights(self, updates: Sequence[Tensor]) -> None:
        """Subtract what came out of the chain from the parameters."""
        for param, update in zip(self.params, updates, strict=True):
            if self.weight_decay:
                param.mul_(1 - self.lr * self.weight_decay)
            param.add_(update.to(param.dtype), alpha=-self.lr)


class ChainOptimizer(torch.optim.Optimizer):
    """An optimizer out of stages: p ← (1 − lr · weight_decay) p − lr · chain(gradient).

    The groups of one step share their messages: however many groups and tensors there are, a step costs one message for each
    exchange along the longest chain.

    A parameter without a gradient is left out of the step, as in torch.optim; where there are other replicas and the chain
    talks to them, a missing gradient counts as zero instead, since all replicas must send the same tensors.

    Args:
        params: parameters, or group dicts as in torch.optim. A group may hold, besides ``lr`` and ``weight_decay``: ``chain``
            (a Stage), ``name``, ``names`` (one a parameter, for messages) and ``layouts`` (one text a parameter, such as
            "matrix", "conv", "batch" or "matrix/3"; default: "matrix").
        chain: the chain of groups that bring none.
        lr: learning rate.
        weight_decay: decoupled weight decay, as in AdamW. Default: 0.
        transport: the way to the other replicas. Default: one replica.

    Raises:
        UsageError: a group without a chain, a negative rate or decay, or layouts that do not match the parameters.

    >>> from muonwire import stages
    >>> weight = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = ChainOptimizer([weight], chain=stages.chain(stages.Momentum(), stages.Polar()), lr=0.1)
    >>> print(optimizer)  # doctest: +ELLIPSIS
    ChainOptimizer (1 replica; polar factors as on ... processors: ...)
      group 0: 1 tensor, 4 parameters, lr=0.1, weight_decay=0: momentum(beta=0.95, nesterov=True, form=ema) → polar(auto)
    """

    # Handed to the stages; see Context.
    watch: Watch | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        chain: Stage | None = None,
        lr: float,
        weight_decay: float = 0.0,
        transport: Transport | None = None,
    ) -> None:
        self.transport = transport or SingleReplica()
        self._chains: list[Chain] = []
        self._default_chain = chain
        self._replicas_agree = False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for what it may hold.

        Raises:
            UsageError: see the class.
        """
        group = dict(param_group)
        index = len(self.param_groups)
        stage = group.pop("chain", self._default_chain)
        if not isinstance(stage, Stage):
            raise UsageError(
                f"ChainOptimizer: group {index} has chain {stage!r}; give a Stage, to it or to the optimizer"
            )
        members = stage if isinstance(stage, Chain) else chain(stage)
        params = group["params"] = (
            [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        )
        group.setdefault("name", f"group {index}")
        group.setdefault("layouts", ["matrix"] * len(params))
        group.setdefault("names", [f"{group['name']}[{i}]" for i in range(len(params))])
        group.update(chain=str(members), step=0, processor=None)
        for key in ("lr", "weight_decay"):
            value = group.get(key, self.defaults[key])
            if not isinstance(value, Tensor) and value < 0:
                raise UsageError(
                    f"ChainOptimizer: {key} of {group['name']} is {value}; it must not be negative"
                )
        if not len(group["layouts"]) == len(group["names"]) == len(params):
            raise UsageError(
                f"ChainOptimizer: {group['name']} has {len(params)} parameters, {len(group['layouts'])} layouts and "
                f"{len(group['names'])} names; give one of each a parameter"
            )
        for layout in group["layouts"]:
            MatrixLayout.parse(layout)
        self._replicas_agree = False
        super().add_param_group(group)
        self._chains.append(members)
        # All state exists from the start, so that a checkpoint taken before the first step can be loaded.
        for param in params:
            if param.requires_grad:
                self.state[param] = members.init(param.detach())

    @property
    def chains(self) -> list[Chain]:
        """The groups' chains, in order."""
        return list(self._chains)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step: all groups through their chains, with shared messages, then the weights.

        Args:
            closure: as in torch.optim: evaluated with gradients on, its loss is returned.

        Raises:
            ReplicaLostError: a replica stopped answering.
            ExchangeError: in the first step: the replicas' parameters or chains differ.
            NonFiniteUpdateError: an update that goes through a codec, or the loss that the training loop saw, is not finite
                on some replica; raised on all of them.
            PayloadError: a replica sent what does not decode.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._replicas_agree:
            self._agree()
        passes = [p for i in range(len(self.param_groups)) if (p := self._begin(i)) is not None]
        updates = drive([p.rounds for p in passes], self.transport)
        if Flag.DIVERGED in self.transport.agreed:
            raise NonFiniteUpdateError(
                "ChainOptimizer: a loss or an update is not finite on at least one replica; the weights were left as they were. "
                "Lower the learning rate, or resume from the last checkpoint"
            )
        for group_pass, moved in zip(passes, updates, strict=True):
            group_pass.move_weights(moved)
        return loss

    @property
    def processor(self) -> Processor:
        """The class that polar factors follow: what the replicas agreed on, else that of the parameters' device."""
        for group in self.param_groups:
            if group.get("processor") is not None:
                return named_processor(group["processor"])
        return find_processor(next(p.device for group in self.param_groups for p in group["params"]))

    def _agree(self) -> None:
        """Make sure that all replicas have the same groups, and take the slowest replica's processor class for all."""
        names = check_agreement(
            self._layout(), self.transport, what="optimizer groups", note=self.processor.name
        )
        agreed = slowest(names).name
        orthogonalizes = any(members.orthogonalizes for members in self._chains)
        if orthogonalizes and len(set(names)) > 1:
            warnings.warn(
                f"ChainOptimizer: the replicas' processors are of different classes ({', '.join(names)} by rank); polar factors "
                f"follow {agreed} on all of them. Products of different machines may round differently all the same: compare "
                "the weights with check_replicas, or use a recipe with local steps or approach_b(server=True)",
                stacklevel=3,
            )
        for group in self.param_groups:
            group["processor"] = agreed
        self._replicas_agree = True

    def _layout(self) -> str:
        return "; ".join(
            f"{g['name']} {g['chain']} {[tuple(p.shape) for p in g['params']]} {g['layouts']}"
            for g in self.param_groups
        )

    def _begin(self, index: int) -> _Pass | None:
        group = self.param_groups[index]
        talks = self.transport.world_size > 1 and self._chains[index].talks
        chosen = [
            (p, layout, name)
            for p, layout, name in zip(group["params"], group["layouts"], group["names"], strict=True)
            if p.grad is not None or (talks and p.requires_grad)
        ]
        if not chosen:
            return None
        group["step"] += 1
        for p, _, _ in chosen:
            if p not in self.state:
                self.state[p] = self._chains[index].init(p)
        updates = [torch.zeros_like(p) if p.grad is None else p.grad for p, _, _ in chosen]
        sparse = next((u for u in updates if u.is_sparse), None)
        if sparse is not None:
            raise UsageError(f"ChainOptimizer: {group['name']} has a sparse gradient; stages take dense ones")
        context = Context(
            lr=float(group["lr"]),
            step=group["step"],
            transport=self.transport,
            layouts=[MatrixLayout.parse(layout) for _, layout, _ in chosen],
            names=[name for _, _, name in chosen],
            watch=self.watch,
            processor=self.processor,
        )
        params = [p for p, _, _ in chosen]
        states = [self.state[p] for p in params]
        return _Pass(
            params=params,
            rounds=self._chains[index].rounds(updates, params, states, context),
            lr=context.lr,
            weight_decay=float(group["weight_decay"]),
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; states keep the dtype they were saved with.

        Raises:
            UsageError: the chains of the saved groups are not this optimizer's.
        """
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if mine["chain"] != saved.get("chain"):
                raise UsageError(
                    f"ChainOptimizer: the saved state of {saved.get('name')!r} belongs to the chain {saved.get('chain')!r}, "
                    f"this optimizer has {mine['chain']!r}; build it with the recipe and options it was saved with"
                )
        super().load_state_dict(state_dict)
        self._replicas_agree = False
        # torch casts floating states to the parameter's dtype, which would round a wider state.
        ordered = [p for group in self.param_groups for p in group["params"]]
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for param, saved_id in zip(ordered, saved_ids, strict=True):
            if saved_id in state_dict["state"]:
                self.state[param] = _copy_state(state_dict["state"][saved_id], param.device)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "transport": self.transport,
            "_chains": self._chains,
            "_default_chain": self._default_chain,
            "_replicas_agree": False,
        }

    def __repr__(self) -> str:
        replicas = self.transport.world_size
        about = f"{replicas} replica{'s' * (replicas != 1)}"
        if any(members.orthogonalizes for members in self._chains):
            about += (
                f"; polar factors as on {self.processor.name} processors: {str(self.processor.dtype)[6:]}"
            )
        lines = [f"{type(self).__name__} ({about})"]
        for group in self.param_groups:
            count, numel = len(group["params"]), sum(p.numel() for p in group["params"])
            lines.append(
                f"  {group['name']}: {count} tensor{'s' * (count != 1)}, {numel:,} parameters, lr={float(group['lr']):g}, "
                f"weight_decay={group['weight_decay']:g}: {group['chain']}"
            )
        return "\n".join(lines)


def _copy_state(state: State, device: torch.device) -> State:
    return {
        key: _copy_state(value, device)
        if isinstance(value, dict)
        else value.detach().clone().to(device)
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
