"""torchft's own DiLoCo, streaming where it has several fragments: its Manager, its lighthouse, its gloo group."""

import importlib.util
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from typing_extensions import override

from muonwire.compare.peers.base import (
    BETAS,
    Peer,
    PeerSettings,
    Replica,
    decayed,
    ring_rounds,
    trainable,
)
from muonwire.errors import UsageError

# The ports of one run's lighthouse after the other's; all replicas begin the same runs in the same order.
_ports = itertools.count(29510)
# A replica on a slow link is no lost one.
_TIMEOUT = timedelta(seconds=600)


@dataclass(frozen=True, kw_only=True)
class TorchftDiLoCo(PeerSettings):
    """Options of torchft_diloco; the defaults are those of torchft's example.

    Args:
        interval: local steps between two synchronizations of a parameter; the steps of a run are a multiple of it.
        outer_lr: rate of the outer SGD.
        outer_momentum: of the outer SGD, with Nesterov's look-ahead.
        fragments: parts of the model that are synchronized one after the other, which divide ``interval``.
        delay: local steps while a fragment's messages travel, fewer than interval / fragments.
        bucketize: gradients of a fragment travel together instead of tensor by tensor.
    """

    name: ClassVar[str] = "torchft_diloco"
    summary: ClassVar[str] = (
        "torchft.local_sgd.DiLoCo: torch.optim.AdamW inside, Nesterov SGD outside, over torchft's gloo group"
    )
    interval: int = 20
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    fragments: int = 1
    delay: int = 0
    bucketize: bool = True

    def __post_init__(self) -> None:
        if self.fragments < 1 or self.interval < 1 or self.interval % self.fragments:
            raise UsageError(
                f"peer torchft_diloco: interval is {self.interval} and fragments is {self.fragments}; both are at least 1, and "
                "fragments divides interval"
            )
        if not 0 <= self.delay < self.interval // self.fragments:
            raise UsageError(
                f"peer torchft_diloco: delay is {self.delay}; it is at least 0 and below interval / fragments, "
                f"{self.interval // self.fragments}"
            )

    @override
    def check(self, *, steps: int) -> None:
        if importlib.util.find_spec("torchft") is None:
            raise UsageError("peer torchft_diloco: torchft is not installed; pip install 'muonwire[elastic]'")
        if steps % self.interval:
            raise UsageError(
                f"peer torchft_diloco: {steps} steps are no multiple of the interval, {self.interval}, so that the last ones would "
                "not be shared; choose other steps, or another interval"
            )

    @override
    def rounds_per_step(self, world_size: int) -> float:
        # A quorum asks the lighthouse and is answered; then a ring all-reduce.
        return (2 + ring_rounds(world_size)) * self.fragments / self.interval

    @override
    def start(self, replica: Replica) -> Peer:
        os.environ.setdefault("RUST_LOG", "error")
        for logger in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
        return DiLoCo(replica, self)


class DiLoCo(Peer):
    """A replica group of one process, which the first replica's lighthouse joins to the others.

    Args:
        replica: this one.
        settings: see TorchftDiLoCo.
    """

    def __init__(self, replica: Replica, settings: TorchftDiLoCo) -> None:
        from torchft import Manager, ProcessGroupGloo
        from torchft.coordination import LighthouseServer
        from torchft.local_sgd import DiLoCo as TheirDiLoCo

        super().__init__(replica)
        inner = torch.optim.AdamW(decayed(trainable(replica.model)), lr=replica.lr, betas=BETAS)
        self.optimizers = [inner]
        fragments = cut(replica.model, settings.fragments)
        outer = [
            torch.optim.SGD(
                fragment.parameters(), lr=settings.outer_lr, momentum=settings.outer_momentum, nesterov=True
            )
            for fragment in fragments
        ]
        port, self._lighthouse = next(_ports), None
        if replica.rank == 0:
            self._lighthouse = LighthouseServer(
                bind=f"[::]:{port}", min_replicas=replica.world_size, join_timeout_ms=10_000
            )
        self._store = TCPStore(replica.address, 0, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        self._group = ProcessGroupGloo(timeout=_TIMEOUT)
        self._manager = Manager(
            pg=self._group,
            load_state_dict=self._take,
            state_dict=self._give,
            min_replica_size=replica.world_size,
            use_async_quorum=False,
            timeout=_TIMEOUT,
            quorum_timeout=_TIMEOUT,
            connect_timeout=_TIMEOUT,
            rank=0,
            world_size=1,
            store_addr=replica.address,
            store_port=self._store.port,
            lighthouse_addr=f"http://{replica.master}:{port}",
            replica_id=f"replica_{replica.rank}",
            hostname=replica.address,
            # All begin with the same weights.
            init_sync=False,
        )
        self._diloco = TheirDiLoCo(
            self._manager,
            fragments,
            inner,
            outer,
            sync_every=settings.interval,
            fragment_sync_delay=settings.delay,
            use_bucketization=settings.bucketize,
        )
        self._diloco.__enter__()

    def _give(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "inner": self.optimizers[0].state_dict()}

    def _take(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizers[0].load_state_dict(state["inner"])

    @override
    def step(self) -> None:
        # torchft's hooks do the rest.
        self.optimizers[0].step()

    @contextmanager
    @override
    def shared_weights(self) -> Iterator[None]:
        """The weights as the last synchronization of each fragment left them."""
        own = [p.detach().clone() for p in self.model.parameters()]
        self._diloco._restore_parameters()
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.model.parameters(), own, strict=True):
                    p.copy_(value)

    @override
    def close(self) -> None:
        self._diloco.__exit__(None, None, None)
        self._manager.shutdown(wait=False)
        self._group.shutdown()
        if self._lighthouse is not None:
            self._lighthouse.shutdown()


def cut(model: nn.Module, count: int) -> list[nn.Module]:
    """The model's parameters in order, in parts of about the same size, as torchft takes fragments.

    A parameter that several modules share is in the first one's part.

    Raises:
        UsageError: the model has fewer modules with parameters than that.
    """
    if count == 1:
        return [model]
    owners: list[_Own] = []
    taken: set[int] = set()
    for module in model.modules():
        own = {
            n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad and id(p) not in taken
        }
        taken |= {id(p) for p in own.values()}
        owners += [_Own(own)] if own else []
    if len(owners) < count:
        raise UsageError(
            f"peer torchft_diloco: a model of {len(owners)} modules with parameters cannot be cut into {count} fragments; use fewer"
        )
    total = sum(owner.size for owner in owners)
    parts = [nn.ModuleList() for _ in range(count)]
    done, last = 0, -1
    for place, owner in enumerate(owners):
        wanted = min(int((done + owner.size / 2) * count / total), count - 1, last + 1)
        # Every part gets a module.
        last = max(wanted, last, count - (len(owners) - place))
        parts[last].append(owner)
        done += owner.size
    assert all(len(part) for part in parts)
    return list(parts)


class _Own(nn.Module):
    """Parameters of a module without those of the modules in it."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)
        self.size = sum(p.numel() for p in parameters.values())
