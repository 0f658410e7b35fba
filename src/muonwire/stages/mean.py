"""The dense exchange: the mean over the replicas."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from muonwire.stages.base import Context, State, TalkingStage
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request


@dataclass(frozen=True, kw_only=True)
class Mean(TalkingStage):
    """u ← (1/R) Σᵣ uᵣ over the R replicas, summed in rank order, in the updates' own dtype on the wire."""

    def estimate_bytes(
        self, params: Sequence[Tensor], layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float:
        """Every element in its own dtype."""
        return float(sum(p.numel() * p.element_size() for p in params))

    def send(
        self, updates: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> Request:
        """What goes out."""
        return Request(tensors=updates)

    def receive(
        self, reply: Reply, params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> list[Tensor]:
        """What the answer becomes."""
        return list(reply.tensors)

    def __str__(self) -> str:
        return "mean"
