"""The contract of a peer: another library's way to train replicas together, with its own messages."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError

# As the recipes have them, so that what differs is how replicas exchange.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One of the replicas that train together.

    Args:
        model: of this replica; all begin with the same weights.
        forward: what computes with the model's parameters: the model itself, or compiled.
        lr: peak learning rate.
        rank: of this replica.
        world_size: their number.
        master: address of the first replica on the network that joins them.
        address: of this replica there.
    """

    model: nn.Module
    forward: nn.Module
    lr: float
    rank: int
    world_size: int
    master: str
    address: str


class Peer(ABC):
    """A peer that trains, on one replica.

    Args:
        replica: this one.
    """

    # Whose learning rates follow the schedule.
    optimizers: Sequence[torch.optim.Optimizer]

    def __init__(self, replica: Replica) -> None:
        self.model = replica.model
        # What a loss is computed with.
        self.compute: nn.Module = replica.forward

    @abstractmethod
    def step(self) -> None:
        """One step of the optimizers, with whatever the peer exchanges in it."""

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Within the block ``model`` holds what all replicas agree on. Default: it does so anyway."""
        yield

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """End what the peer runs beside the training."""


@dataclass(frozen=True, kw_only=True)
class PeerSettings(ABC):
    """The options of a peer: a frozen dataclass with a default for each.

    Attributes:
        name: on the command line.
        summary: what it does, in a line.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Self:
        """The settings of a text such as "torchft_diloco(interval=20)".

        Raises:
            UsageError: an option that there is not, or a value that is not allowed.
        """
        allowed = [f.name for f in fields(cls)]
        unknown = [name for name in options if name not in allowed]
        if unknown:
            raise UsageError(
                f"peer {cls.name}: {', '.join(unknown)} is not an option; allowed are {', '.join(allowed) or 'none'}"
            )
        return cls(**options)

    def check(self, *, steps: int) -> None:  # noqa: B027 - most take any
        """Raise UsageError where a run of ``steps`` is not possible, or what the peer needs is not installed."""

    @abstractmethod
    def start(self, replica: Replica) -> Peer:
        """Begin on a replica; all call it together."""

    @abstractmethod
    def rounds_per_step(self, world_size: int) -> float:
        """Messages of a step that wait for one another, each one latency, as the peer's algorithm has it."""


def ring_rounds(world_size: int) -> int:
    """Messages of gloo's ring all-reduce that wait for one another: 2 (R − 1)."""
    return 2 * (world_size - 1)


def decayed(named: Sequence[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Groups for AdamW: tensors of two or more dimensions decay, the others do not."""
    matrices = [p for _, p in named if p.ndim >= 2]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The trainable parameters with their names, tied ones once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
