"""torch's DistributedDataParallel with torch's own optimizers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from muonwire.compare.peers.base import (
    BETAS,
    WEIGHT_DECAY,
    Peer,
    PeerSettings,
    Replica,
    decayed,
    ring_rounds,
    trainable,
)
from muonwire.errors import UsageError
from muonwire.optim.routing import route

HOOKS = ("none", "bf16", "powersgd")


def num_bytes(model: nn.Module) -> int:
    """Of the gradients."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _bf16(
    state: Any,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Torch's bf16_compress_hook, which DDP refuses by its name where there is no nccl, though gloo can do what it does."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(state, bucket)


class DDP(Peer):
    """Gradients are averaged by gloo while the backward pass goes on, in the buckets that DDP makes.

    Args:
        replica: this one.
        optimizers: of the model's parameters.
        hook: how gradients are compressed, one of ``HOOKS``.
    """

    def __init__(
        self, replica: Replica, optimizers: list[torch.optim.Optimizer], *, hook: str, rank: int
    ) -> None:
        super().__init__(replica)
        self.optimizers = optimizers
        # Torch's PowerSGD waits inside callbacks, on the two threads of gloo that are to do what it waits for: with two buckets
        # and more a step hangs for good.
        cap_mb = num_bytes(replica.model) // 2**20 + 1 if hook == "powersgd" else None
        wrapped = DistributedDataParallel(replica.forward, bucket_cap_mb=cap_mb)
        if hook == "bf16":
            wrapped.register_comm_hook(None, _bf16)
        elif hook == "powersgd":
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

            state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
            wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self.compute = wrapped

    @override
    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@dataclass(frozen=True, kw_only=True)
class DDPSettings(PeerSettings):
    """Options of both kinds.

    Args:
        hook: DDP's communication hook: "none"; "bf16", gradients in 16 bits; "powersgd", low rank with feedback.
        rank: of powersgd.
    """

    hook: str = "none"
    rank: int = 1

    def __post_init__(self) -> None:
        if self.hook not in HOOKS:
            raise UsageError(f"peer {self.name}: hook is {self.hook!r}; allowed are {', '.join(HOOKS)}")
        if self.rank < 1:
            raise UsageError(f"peer {self.name}: rank is {self.rank}; it must be at least 1")

    @override
    def rounds_per_step(self, world_size: int) -> float:
        # PowerSGD averages its two factors one after the other.
        return ring_rounds(world_size) * (2 if self.hook == "powersgd" else 1)


@dataclass(frozen=True, kw_only=True)
class DDPAdamW(DDPSettings):
    """Options of ddp_adamw; see DDPSettings."""

    name: ClassVar[str] = "ddp_adamw"
    summary: ClassVar[str] = "torch's DistributedDataParallel over gloo → torch.optim.AdamW"

    @override
    def start(self, replica: Replica) -> Peer:
        groups = decayed(trainable(replica.model))
        return DDP(
            replica, [torch.optim.AdamW(groups, lr=replica.lr, betas=BETAS)], hook=self.hook, rank=self.rank
        )


@dataclass(frozen=True, kw_only=True)
class DDPMuon(DDPSettings):
    """Options of ddp_muon; see DDPSettings."""

    name: ClassVar[str] = "ddp_muon"
    summary: ClassVar[str] = (
        "torch's DistributedDataParallel over gloo → torch.optim.Muon on hidden matrices, torch.optim.AdamW on the rest"
    )

    @override
    def start(self, replica: Replica) -> Peer:
        routing = route(replica.model)
        muon = torch.optim.Muon(
            [r.param for r in routing.polar],
            lr=replica.lr,
            weight_decay=WEIGHT_DECAY,
            momentum=0.95,
            # One rate serves both, as in the recipe.
            adjust_lr_fn="match_rms_adamw",
        )
        rest = decayed([(r.name, r.param) for r in routing.adam])
        optimizers: list[torch.optim.Optimizer] = [muon, torch.optim.AdamW(rest, lr=replica.lr, betas=BETAS)]
        return DDP(replica, optimizers, hook=self.hook, rank=self.rank)
