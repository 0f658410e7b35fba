"""What the processor spends on an exchange: encoding, decoding and what goes with them, measured on a sample."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.plan.exchanges import Talk
from muonwire.stages import Stage
from muonwire.stages.base import Context
from muonwire.stages.layout import MatrixLayout
from muonwire.transport.base import Transport
from muonwire.transport.meter import Meter

# The samples: one square matrix, no larger than the model, and several small ones.
LARGEST_SIDE, SMALL_SIDE, NUM_SMALL = 1024, 16, 16
TIMED = 3


class Echo(Transport):
    """All replicas send what this one sends, in no time."""

    def __init__(self, world_size: int) -> None:
        self.rank = 0
        self.world_size = world_size
        self.meter = Meter()

    @override
    def gather(self, payload: bytes, *, purpose: str = "update") -> list[bytes]:
        return [payload] * self.world_size

    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        return list(tensors)


@dataclass(frozen=True, kw_only=True)
class ProcessorCost:
    """Seconds that one exchange of a stage takes beside the link.

    Args:
        per_entry_s: of each entry of a tensor.
        per_tensor_s: of each tensor besides.
    """

    per_entry_s: float
    per_tensor_s: float

    def seconds(self, talk: Talk) -> float:
        """Of the tensors that go through a stage."""
        return self.per_entry_s * sum(p.numel() for p in talk.params) + self.per_tensor_s * len(talk.params)


def cost_of(stage: Stage, *, replicas: int, largest_numel: int) -> ProcessorCost:
    """Time one exchange of a stage on samples, as it is done with so many replicas.

    Decoding grows with the number of replicas, and is part of it. The work of a dense mean is not.

    Args:
        stage: that talks.
        replicas: whose payloads are decoded.
        largest_numel: entries of the largest tensor that it is to exchange.
    """
    side = LARGEST_SIDE
    while side > SMALL_SIDE and side * side > largest_numel:
        side //= 2
    small_s = _seconds(stage, [SMALL_SIDE] * NUM_SMALL, replicas) / NUM_SMALL
    large_s = _seconds(stage, [side], replicas)
    small, large = SMALL_SIDE**2, side**2
    per_entry_s = max((large_s - small_s) / (large - small), 0.0) if large > small else small_s / small
    return ProcessorCost(per_entry_s=per_entry_s, per_tensor_s=max(small_s - per_entry_s * small, 0.0))


def _seconds(stage: Stage, sides: Sequence[int], replicas: int) -> float:
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(side, side, generator=generator) for side in sides]
    states = [stage.init(update) for update in updates]
    layouts = [MatrixLayout.parse("matrix")] * len(sides)
    transport = Echo(replicas)
    times = []
    # The first turn makes what later ones keep.
    for step in range(1, TIMED + 2):
        context = Context(lr=0.01, step=step, transport=transport, layouts=layouts)
        start_s = time.perf_counter()
        stage.apply(updates, updates, states, context)
        times.append(time.perf_counter() - start_s)
    return median(times[1:])
