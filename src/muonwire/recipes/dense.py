"""The dense recipes: gradients are averaged as they are, every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from muonwire.errors import UsageError
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


@dataclass(frozen=True, kw_only=True)
class MuonSettings(RoutedSettings, AdamRestSettings, ScaleSettings, PolarSettings, MomentumSettings):
    """Muon for hidden matrices, Adam for the rest: momentum, polar factor, scale, Adam, and which is which."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.polar_chain()

    def polar_chain(self) -> Chain:
        """momentum → polar → scale."""
        return chain(self.momentum_stage(), self.polar_stage(), self.scale_stage())


def named_group(name: str, named: Sequence[tuple[str, Tensor]], **extra: Any) -> dict[str, Any]:
    """A parameter group with names for messages."""
    return {"name": name, "params": [p for _, p in named], "names": [n for n, _ in named], **extra}


def by_dimensions(
    name: str, named: Sequence[tuple[str, Tensor]], *, weight_decay: float, **extra: Any
) -> list[dict[str, Any]]:
    """Groups of the matrices, which decay, and of the vectors, which do not; empty ones are left out."""
    matrices = [(n, p) for n, p in named if p.ndim >= 2]
    vectors = [(n, p) for n, p in named if p.ndim < 2]
    groups = [
        named_group(f"{name} matrices", matrices, weight_decay=weight_decay, **extra),
        named_group(f"{name} vectors", vectors, weight_decay=0.0, **extra),
    ]
    return [g for g in groups if g["params"]]


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All trainable parameters with their names, tied ones once.

    Raises:
        UsageError: there are none.
    """
    named: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError(f"recipe: {type(model).__name__} has no trainable parameter")
    return named


def routed_groups(
    model: nn.Module,
    settings: RoutedSettings,
    *,
    hidden: Stage,
    rest: Stage,
    rest_rate: float = 1.0,
) -> list[dict[str, Any]]:
    """The groups of hidden matrices and of everything else, each with a chain of its own.

    Args:
        model: its trainable parameters.
        settings: rate, routing and weight decay.
        hidden: chain of the parameters that routing sends to polar.
        rest: chain of the others.
        rest_rate: their learning rate over that of the settings. Default: 1.
    """
    routing = settings.routing(model)
    matrices = hidden_group([(r.name, r.param, str(r.layout)) for r in routing.polar], hidden, settings)
    others = by_dimensions(
        "other",
        [(r.name, r.param) for r in routing.adam],
        weight_decay=settings.weight_decay,
        chain=rest,
        lr=settings.lr * rest_rate,
    )
    return [matrices, *others]


def hidden_group(
    routes: Sequence[tuple[str, Tensor, str]], stage: Stage, settings: RecipeSettings, name: str = "hidden"
) -> dict[str, Any]:
    """The group of hidden matrices: (name, parameter, layout) of each."""
    return named_group(
        name,
        [(n, p) for n, p, _ in routes],
        chain=stage,
        layouts=[layout for _, _, layout in routes],
        weight_decay=settings.weight_decay,
    )


def muon_groups(
    model: nn.Module, settings: MuonSettings, *, exchange_first: Sequence[Stage]
) -> list[dict[str, Any]]:
    """The groups of Muon: hidden matrices through momentum → polar → scale, the rest through Adam."""
    return routed_groups(
        model,
        settings,
        hidden=chain(*exchange_first, settings.polar_chain()),
        rest=chain(*exchange_first, settings.adam_stage()),
        rest_rate=settings.adam_lr_ratio,
    )


@recipe(AdamSettings, summary="dense AdamW: mean → adam", source="arXiv 1711.05101")
def adamw(model: nn.Module, options: AdamSettings) -> ChainOptimizer:
    """Dense AdamW on the mean gradient."""
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(model, groups, chain=chain(Mean(), options.adam_stage()))


@recipe(
    MuonSettings,
    summary="dense Muon: mean → momentum → polar → scale for hidden matrices, mean → adam for the rest",
    source="Jordan et al. (2024); scale: arXiv 2502.16982",
)
def muon(model: nn.Module, options: MuonSettings) -> ChainOptimizer:
    """Dense Muon: the mean gradient's momentum, orthogonalized."""
    return options.optimizer(model, muon_groups(model, options, exchange_first=[Mean()]))


@dataclass(frozen=True, kw_only=True)
class NorMuonSettings(MuonSettings):
    """Options of normuon.

    Args:
        row_beta2: decay of the rows' mean squares, in [0, 1). Default: 0.95.
    """

    row_beta2: float = 0.95

    @override
    def polar_chain(self) -> Chain:
        """Momentum → polar → row_normalize → scale."""
        return normalized_chain(self, row_beta2=self.row_beta2)


def normalized_chain(settings: MuonSettings, *, row_beta2: float) -> Chain:
    """Momentum → polar → row_normalize → scale."""
    rows = RowNormalize(beta2=row_beta2)
    return chain(settings.momentum_stage(), settings.polar_stage(), rows, settings.scale_stage())


@recipe(
    NorMuonSettings,
    summary="dense NorMuon: mean → momentum → polar → row_normalize → scale; mean → adam for the rest",
    source="NorMuon, arXiv 2510.05491",
)
def normuon(model: nn.Module, options: NorMuonSettings) -> ChainOptimizer:
    """Dense Muon whose rows are brought to about the same size."""
    return options.optimizer(model, muon_groups(model, options, exchange_first=[Mean()]))


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
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(model, groups, chain=chain(Mean(), options.momentum_stage()))
