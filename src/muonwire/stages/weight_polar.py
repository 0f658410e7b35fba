"""Orthogonalizing the weights themselves, every so many steps."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, States, Tensors
from muonwire.stages.polar import Polar


@dataclass(frozen=True, kw_only=True)
class WeightPolar(Stage):
    """In steps P, 2 P, … u ← u + strength · (W − s · polar(W)) / lr with s = ‖W‖_F / √min(m, n).

    So the weight moves by ``strength`` of the way to its polar factor of equal Frobenius norm. A step with lr = 0 does nothing.

    Args:
        period: P, at least 1. Default: 100.
        strength: in (0, 1]. Default: 1.
        polar: how polar factors are made. Default: Polar().

    Source: future work 3 of the note “The failed integration of Muon and DisTrO”; the note “Muon from the top down”, by which
    Muon replaces "the weight matrix with the nearest orthogonal matrix".
    """

    period: int = 100
    strength: float = 1.0
    polar: Polar = Polar()

    def __post_init__(self) -> None:
        if self.period < 1 or not 0 < self.strength <= 1:
            raise UsageError(
                f"weight_polar: period is {self.period} and strength {self.strength}; a period of at least 1 step and a "
                "strength in (0, 1] are wanted"
            )

    @property
    @override
    def orthogonalizes(self) -> bool:
        return True

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        if context.step % self.period or context.lr == 0:
            return list(updates)
        weights = [p.detach() for p in params]
        factors = self.polar.apply(weights, params, states, context)
        results = []
        for update, weight, factor, layout in zip(updates, weights, factors, context.layouts, strict=True):
            ways = []
            for matrices, factors_of in zip(layout.split(weight), layout.split(factor), strict=True):
                size = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
                ways.append(matrices - factors_of * (size / min(matrices.shape[-2:]) ** 0.5))
            way = layout.join(ways, tuple(weight.shape))
            results.append(update + way * (self.strength / context.lr))
        return results
