"""The dense recipes: gradients are averaged as they are, every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from typing_extensions import override

from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.routing import Parts, Routing, route
from muonwire.recipes.base import (
    AdamRestSettings,
    AdamSettings,
    MomentumSettings,
    PolarSettings,
    RecipeSettings,
    ScaleSettings,
)
from muonwire.recipes.define import recipe
from muonwire.recipes.groups import by_dimensions, hidden_group
from muonwire.stages import Chain, Mean, Momentum, RowNormalize, Stage, chain


@dataclass(frozen=True, kw_only=True)
class RoutedSettings(RecipeSettings):
    """Which parameters are orthogonalized.

    Args:
        polar, adam: regular expressions for parameter names to treat otherwise than routing would.
        split: regular expression to the parts of fused weights: their number, {"qkv": 3}, their sizes, {"qkv": (64, 16, 16)},
            or {"gate_up": "2 interleaved"} where the rows of the parts take turns; see ``muonwire.optim.route``.
    """

    polar: Sequence[str] = ()
    adam: Sequence[str] = ()
    split: Mapping[str, Parts] = field(default_factory=dict)

    def routing(self, model: nn.Module) -> Routing:
        """Which parameters are orthogonalized, and how the others are treated."""
        return route(model, polar=self.polar, adam=self.adam, split=self.split)

    def routed_groups(
        self, model: nn.Module, *, hidden: Stage, rest: Stage, rest_rate: float = 1.0
    ) -> list[dict[str, Any]]:
        """The groups of hidden matrices and of everything else, each with a chain of its own.

        Args:
            model: its trainable parameters.
            hidden: chain of the parameters that routing sends to polar.
            rest: chain of the others.
            rest_rate: their learning rate over ``lr``. Default: 1.
        """
        routing = self.routing(model)
        routes = [(r.name, r.param, str(r.layout)) for r in routing.polar]
        others = by_dimensions(
            "other",
            [(r.name, r.param) for r in routing.adam],
            weight_decay=self.weight_decay,
            chain=rest,
            lr=self.lr * rest_rate,
        )
        return [hidden_group(routes, hidden, weight_decay=self.weight_decay), *others]

    def routed(
        self, model: nn.Module, *, hidden: Stage, rest: Stage, rest_rate: float = 1.0
    ) -> ChainOptimizer:
        """The optimizer of ``routed_groups``."""
        return self.optimizer(model, self.routed_groups(model, hidden=hidden, rest=rest, rest_rate=rest_rate))


@dataclass(frozen=True, kw_only=True)
class MuonSettings(RoutedSettings, AdamRestSettings, ScaleSettings, PolarSettings, MomentumSettings):
    """Muon for hidden matrices, Adam for the rest: momentum, polar factor, scale, Adam, and which is which."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.polar_chain()

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
