"""Source 004's description of Muon, as it is worded: momentum SGD whose weights are orthogonalized after every step."""

from dataclasses import dataclass

from torch import nn

from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import Recipe
from muonwire.recipes.dense import MuonSettings, routed_groups
from muonwire.stages import Mean, Momentum, Stage, WeightPolar, chain


@dataclass(frozen=True, kw_only=True)
class SGDWeightPolarSettings(MuonSettings):
    """Options of sgd_weight_polar; those of Muon are inherited, of which ``scale`` has no effect.

    Args:
        period: steps from one orthogonalization of the weights to the next; 0: never, which is momentum SGD. Default: 1.
        strength: how much of the way to its polar factor of equal Frobenius norm a weight goes, in (0, 1]. Default: 1.
    """

    period: int = 1
    strength: float = 1.0

    def hidden_stages(self) -> list[Stage]:
        """Momentum, then the weights' polar factor."""
        momentum = Momentum(beta=self.momentum, nesterov=self.nesterov, form="heavy_ball")
        if self.period == 0:
            return [momentum]
        return [momentum, WeightPolar(period=self.period, strength=self.strength, polar=self.polar_stage())]


def _build(model: nn.Module, options: SGDWeightPolarSettings) -> ChainOptimizer:
    groups = routed_groups(
        model,
        options,
        hidden=chain(Mean(), *options.hidden_stages()),
        rest=chain(Mean(), options.adam_stage()),
    )
    return options.optimizer(model, groups)


SGD_WEIGHT_POLAR = Recipe(
    name="sgd_weight_polar",
    options=SGDWeightPolarSettings,
    build=_build,
    summary="mean → momentum → the weight's own polar factor for hidden matrices, mean → adam for the rest",
    source="source 004, Muon as its first sentence describes it",
)
