"""Muon as the note “Muon from the top down” first describes it: SGD that orthogonalizes the weights after every step."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import MomentumSettings, PolarSettings, checked
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import DenseRestSettings
from muonwire.stages import Mean, Momentum, Stage, WeightPolar, chain


@dataclass(frozen=True, kw_only=True)
class SGDWeightPolarSettings(DenseRestSettings, PolarSettings, MomentumSettings):
    """Options of sgd_weight_polar.

    Args:
        period: steps from one orthogonalization of the weights to the next; 0: never, which is momentum SGD. Default: 1.
        strength: how much of the way to its polar factor of equal Frobenius norm a weight goes, in (0, 1]. Default: 1.
    """

    period: int = 1
    strength: float = 1.0

    @override
    def idle(self) -> Mapping[str, str]:
        never = (
            {} if self.period else dict.fromkeys(("strength", "method", "schedule", "dtype"), "with a period")
        )
        return {**super().idle(), **never}

    @override
    def momentum_stage(self) -> Momentum:
        return Momentum(beta=self.momentum, nesterov=self.nesterov, form="heavy_ball")

    @checked
    def hidden_stages(self) -> list[Stage]:
        """Momentum, then the weights' polar factor."""
        momentum = self.momentum_stage()
        if self.period == 0:
            return [momentum]
        return [momentum, WeightPolar(period=self.period, strength=self.strength, polar=self.polar_stage())]


@recipe(
    SGDWeightPolarSettings,
    summary="mean → momentum → the weight's own polar factor for hidden matrices, mean → adam for the rest",
    source="the first sentence of “Muon from the top down”",
)
def sgd_weight_polar(model: nn.Module, options: SGDWeightPolarSettings) -> ChainOptimizer:
    """Momentum SGD whose weights, not updates, are orthogonalized."""
    return options.with_dense_rest(model, chain(Mean(), *options.hidden_stages()))
