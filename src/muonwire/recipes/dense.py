"""The dense recipes: gradients are averaged as they are, every step."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from typing_extensions import override

from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import (
    AdamRestSettings,
    AdamSettings,
    MomentumSettings,
    PolarSettings,
    RoutedSettings,
    ScaleSettings,
    checked,
)
from muonwire.recipes.define import recipe
from muonwire.stages import Chain, Mean, Momentum, RowNormalize, Stage, chain


@dataclass(frozen=True, kw_only=True)
class DenseRestSettings(RoutedSettings, AdamRestSettings):
    """Which parameters are orthogonalized, and Adam for the rest."""

    def with_dense_rest(self, model: nn.Module, hidden: Stage) -> ChainOptimizer:
        """An optimizer with this chain for hidden matrices, and dense AdamW for all other parameters."""
        rest = chain(Mean(), self.adam_stage())
        return self.routed(model, hidden=hidden, rest=rest, rest_rate=self.adam_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class MuonSettings(DenseRestSettings, ScaleSettings, PolarSettings, MomentumSettings):
    """Muon for hidden matrices, Adam for the rest: momentum, polar factor, scale, Adam, and which is which."""

    @checked
    def polar_chain(self) -> Chain:
        """momentum → polar → scale."""
        return chain(self.momentum_stage(), self.polar_stage(), self.scale_stage())

    def muon_groups(self, model: nn.Module, *exchange: Stage) -> list[dict[str, Any]]:
        """The groups of Muon: hidden matrices through ``polar_chain``, the rest through Adam, each after these stages."""
        return self.routed_groups(
            model,
            hidden=chain(*exchange, self.polar_chain()),
            rest=chain(*exchange, self.adam_stage()),
            rest_rate=self.adam_lr_ratio,
        )


@recipe(AdamSettings, summary="dense AdamW: mean → adam", source="arXiv 1711.05101")
def adamw(model: nn.Module, options: AdamSettings) -> ChainOptimizer:
    """Dense AdamW on the mean gradient."""
    return options.uniform(model, chain(Mean(), options.adam_stage()))


@recipe(
    MuonSettings,
    summary="dense Muon: mean → momentum → polar → scale for hidden matrices, mean → adam for the rest",
    source="Jordan et al. (2024); scale: arXiv 2502.16982",
)
def muon(model: nn.Module, options: MuonSettings) -> ChainOptimizer:
    """Dense Muon: the mean gradient's momentum, orthogonalized."""
    return options.optimizer(model, options.muon_groups(model, Mean()))


@dataclass(frozen=True, kw_only=True)
class NorMuonSettings(MuonSettings):
    """Options of normuon.

    Args:
        row_beta2: decay of the rows' mean squares, in [0, 1). Default: 0.95.
    """

    row_beta2: float = 0.95

    @override
    def polar_chain(self) -> Chain:
        """momentum → polar → row_normalize → scale."""
        return normalized_chain(self, row_beta2=self.row_beta2)


def normalized_chain(settings: MuonSettings, *, row_beta2: float) -> Chain:
    """momentum → polar → row_normalize → scale."""
    rows = RowNormalize(beta2=row_beta2)
    return chain(settings.momentum_stage(), settings.polar_stage(), rows, settings.scale_stage())


@recipe(
    NorMuonSettings,
    summary="dense NorMuon: mean → momentum → polar → row_normalize → scale; mean → adam for the rest",
    source="NorMuon, arXiv 2510.05491",
)
def normuon(model: nn.Module, options: NorMuonSettings) -> ChainOptimizer:
    """Dense Muon whose rows are brought to about the same size."""
    return options.optimizer(model, options.muon_groups(model, Mean()))


@dataclass(frozen=True, kw_only=True)
class SGDSettings(MomentumSettings):
    """Options of sgd."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    @override
    def momentum_stage(self) -> Momentum:
        return Momentum(beta=self.momentum, nesterov=self.nesterov, form="heavy_ball")


@recipe(
    SGDSettings,
    summary="dense momentum SGD: mean → momentum",
    source="Polyak (1964); Nesterov (1983)",
)
def sgd(model: nn.Module, options: SGDSettings) -> ChainOptimizer:
    """Dense SGD with the heavy ball's momentum."""
    return options.uniform(model, chain(Mean(), options.momentum_stage()))
