"""The dense exchange: the mean over the replicas."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from muonwire.stages.base import Context, ElementwiseStage, States, TalkingStage, Tensors
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request


@dataclass(frozen=True, kw_only=True)
class Mean(ElementwiseStage, TalkingStage):
    """u ← (1/R) Σᵣ uᵣ over the R replicas, in the parameters' dtype on the wire, summed in rank order and at least in float32.

    The mean of a shard is the shard of the mean.
    """

    @override
    def estimate_bytes(self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int) -> float:
        """Every element in its parameter's dtype."""
        return float(sum(p.numel() * p.element_size() for p in params))

    @override
    def send(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Request:
        dtypes = context.dtypes or [u.dtype for u in updates]
        return Request(tensors=[u.to(dtype) for u, dtype in zip(updates, dtypes, strict=True)])

    @override
    def receive(self, reply: Reply, params: Tensors, states: States, context: Context) -> list[Tensor]:
        return [mean.to(p.dtype) for mean, p in zip(reply.tensors, params, strict=True)]

    def __str__(self) -> str:
        return "mean"
