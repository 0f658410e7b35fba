"""MuonFast of the note “Why MuonFast fails on vision transformers”: as its text describes it, and with each of its fixes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from typing_extensions import override

from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import MuonSettings
from muonwire.stages import (
    Adam,
    ByRate,
    Chain,
    KeepNorm,
    LargeOnly,
    Mean,
    Momentum,
    Scale,
    Stage,
    chain,
)


@dataclass(frozen=True, kw_only=True)
class MuonFastSettings(MuonSettings):
    """Options of muonfast.

    Args:
        rate_inside: multiply by the learning rate before the polar factor instead of after it, as the note's text has it: the rate
            then cancels, and the step is the polar factor itself. Default: False.
        preconditioner: fix 1, Adam's denominator: "before" puts Adam in the place of the momentum (β₁ is ``momentum``), "after"
            divides the polar factor by the root mean square of its entries over the steps, "none" does neither. Default: "none".
        polar_at_least: fix 2, matrices whose smaller side is less are not orthogonalized; the note names 128. Default: 1.
        keep_norm: fix 3, the direction of the polar factor at the size of what was orthogonalized. Default: False.
        rest: what embeddings, head, norms and biases go through: "sgd", as the note describes it, or "adam". Default: "sgd".
        scale: "none", "small" (its dimension-aware scaling, (min(m, n)/256)²), "rms" or "spectral". Default: "none".
    """

    rate_inside: bool = False
    preconditioner: Literal["none", "before", "after"] = "none"
    polar_at_least: int = 1
    keep_norm: bool = False
    rest: Literal["sgd", "adam"] = "sgd"
    scale: Literal["spectral", "rms", "small", "none"] = "none"
    weight_decay: float = 0.0

    @override
    def idle(self) -> Mapping[str, str]:
        idle = dict(super().idle())
        if self.rest == "sgd":
            idle["beta1"] = 'with rest="adam"'
            if self.preconditioner == "none":
                either = 'with rest="adam" or a preconditioner'
                idle |= {"beta2": either, "eps": either}
        elif self.preconditioner == "before":
            idle["nesterov"] = 'with rest="sgd" or without preconditioner="before"'
        if self.keep_norm:
            idle["scale"] = "without keep_norm"
        return idle

    @override
    def momentum_stage(self) -> Momentum:
        """The note's velocity, v ← β v + g, or g + β v with Nesterov."""
        return Momentum(beta=self.momentum, nesterov=self.nesterov, form="heavy_ball")

    @override
    def polar_chain(self) -> Chain:
        """Velocity, orthogonalized and scaled, with the fixes that are chosen."""
        direction: Stage = chain(self.polar_stage(), Scale(kind=self.scale))
        if self.preconditioner == "after":
            direction = chain(direction, Adam(beta1=0.0, beta2=self.beta2, eps=self.eps))
        if self.keep_norm:
            direction = KeepNorm(stage=direction)
        if self.polar_at_least > 1:
            direction = LargeOnly(stage=direction, at_least=self.polar_at_least)
        first: Stage = (
            Adam(beta1=self.momentum, beta2=self.beta2, eps=self.eps)
            if self.preconditioner == "before"
            else self.momentum_stage()
        )
        if self.rate_inside:
            return chain(first, ByRate(power=1), direction, ByRate(power=-1))
        return chain(first, direction)

    def rest_stage(self) -> Stage:
        """The stage of the parameters that are not orthogonalized."""
        return self.adam_stage() if self.rest == "adam" else self.momentum_stage()


@recipe(
    MuonFastSettings,
    summary="mean → momentum → polar for hidden matrices, mean → momentum for the rest; the note's fixes are options",
    source="“Why MuonFast fails on vision transformers”",
)
def muonfast(model: nn.Module, options: MuonFastSettings) -> ChainOptimizer:
    """MuonFast: the heavy ball's momentum, orthogonalized."""
    return options.routed(
        model,
        hidden=chain(Mean(), options.polar_chain()),
        rest=chain(Mean(), options.rest_stage()),
        rest_rate=options.adam_lr_ratio,
    )
