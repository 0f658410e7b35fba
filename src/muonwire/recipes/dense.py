"""The dense recipes: gradients are averaged as they are, every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.routing import Parts, Routing, route
from muonwire.recipes.base import AdamSettings, Recipe, RecipeSettings
from muonwire.stages import Adam, Chain, Mean, Momentum, Polar, RowNormalize, Scale, Stage, chain


@dataclass(frozen=True, kw_only=True)
class MuonSettings(AdamSettings):
    """The options of every recipe with Muon in it; those of its Adam part are inherited.

    Args:
        momentum: β, in [0, 1). Default: 0.95.
        nesterov: look ahead. Default: True.
        method: of the polar factor; see ``muonwire.polar.polar``. Default: "auto".
        schedule: name of its coefficients. Default: the method's own.
        dtype: of its products. Default: what the slowest replica's processor multiplies fastest.
        scale: "rms" (one learning rate serves polar and Adam), "spectral" or "none". Default: "rms".
        adam_lr_ratio: learning rate of the Adam part over that of the polar part. Default: 1.
        polar, adam: regular expressions for parameter names to treat otherwise than routing would.
        split: regular expression to the parts of fused weights: their number, {"qkv": 3}, their sizes, {"qkv": (64, 16, 16)},
            or {"gate_up": "2 interleaved"} where the rows of the parts take turns; see ``muonwire.optim.route``.
    """

    momentum: float = 0.95
    nesterov: bool = True
    method: str = "auto"
    schedule: str | None = None
    dtype: str | None = None
    scale: str = "rms"
    adam_lr_ratio: float = 1.0
    polar: Sequence[str] = ()
    adam: Sequence[str] = ()
    split: Mapping[str, Parts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.polar_chain()
        Adam(beta1=self.beta1, beta2=self.beta2, eps=self.eps)
        if self.adam_lr_ratio <= 0:
            raise UsageError(f"muon: adam_lr_ratio is {self.adam_lr_ratio}; it must be positive")

    def polar_chain(self) -> Chain:
        """momentum → polar → scale."""
        return chain(self.momentum_stage(), self.polar_stage(), self.scale_stage())

    def momentum_stage(self) -> Momentum:
        """Momentum with these settings."""
        return Momentum(beta=self.momentum, nesterov=self.nesterov)

    def polar_stage(self) -> Polar:
        """Orthogonalization with these settings."""
        return Polar(method=self.method, schedule=self.schedule, dtype=self.dtype)

    def scale_stage(self) -> Scale:
        """The scale by shape."""
        return Scale(kind=self.scale)

    def routing(self, model: nn.Module) -> Routing:
        """Which parameters are orthogonalized, and how the others are treated."""
        return route(model, polar=self.polar, adam=self.adam, split=self.split)


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


def muon_groups(
    model: nn.Module, settings: MuonSettings, *, exchange_first: Sequence[Stage]
) -> list[dict[str, Any]]:
    """The groups of Muon: hidden matrices through momentum → polar → scale, the rest through Adam."""
    return routed_groups(
        model,
        settings,
        hidden=chain(*exchange_first, settings.polar_chain()),
        rest=chain(*exchange_first, settings.adam_stage()),
    )


def routed_groups(
    model: nn.Module, settings: MuonSettings, *, hidden: Stage, rest: Stage
) -> list[dict[str, Any]]:
    """The groups of hidden matrices and of everything else, each with a chain and a learning rate of its own."""
    routing = settings.routing(model)
    matrices = named_group(
        "hidden",
        [(r.name, r.param) for r in routing.polar],
        chain=hidden,
        layouts=[str(r.layout) for r in routing.polar],
        weight_decay=settings.weight_decay,
    )
    others = by_dimensions(
        "other",
        [(r.name, r.param) for r in routing.adam],
        weight_decay=settings.weight_decay,
        chain=rest,
        lr=settings.lr * settings.adam_lr_ratio,
    )
    return [matrices, *others]


def _build_adamw(model: nn.Module, options: AdamSettings) -> ChainOptimizer:
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(model, groups, chain=chain(Mean(), options.adam_stage()))


def _build_muon(model: nn.Module, options: MuonSettings) -> ChainOptimizer:
    return options.optimizer(model, muon_groups(model, options, exchange_first=[Mean()]))


ADAMW = Recipe(
    name="adamw",
    options=AdamSettings,
    build=_build_adamw,
    summary="dense AdamW: mean → adam",
    source="arXiv 1711.05101",
)
MUON = Recipe(
    name="muon",
    options=MuonSettings,
    build=_build_muon,
    summary="dense Muon: mean → momentum → polar → scale for hidden matrices, mean → adam for the rest",
    source="Jordan et al. (2024); scale: arXiv 2502.16982",
)


@dataclass(frozen=True, kw_only=True)
class NorMuonSettings(MuonSettings):
    """Options of normuon; those of Muon are inherited.

    Args:
        row_beta2: decay of the rows' mean squares, in [0, 1). Default: 0.95.
    """

    row_beta2: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        RowNormalize(beta2=self.row_beta2)

    def polar_chain(self) -> Chain:
        """Momentum → polar → row_normalize → scale."""
        return normalized_chain(self, row_beta2=self.row_beta2)


def normalized_chain(settings: MuonSettings, *, row_beta2: float) -> Chain:
    """Momentum → polar → row_normalize → scale."""
    rows = RowNormalize(beta2=row_beta2)
    return chain(settings.momentum_stage(), settings.polar_stage(), rows, settings.scale_stage())


@dataclass(frozen=True, kw_only=True)
class SGDSettings(RecipeSettings):
    """Options of sgd.

    Args:
        momentum: of the heavy ball, in [0, 1). Default: 0.9.
        nesterov: look ahead. Default: True.
        weight_decay: decoupled, on tensors of two or more dimensions only. Default: 0.
    """

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage()

    def stage(self) -> Momentum:
        """The momentum."""
        return Momentum(beta=self.momentum, nesterov=self.nesterov, form="heavy_ball")


def _build_sgd(model: nn.Module, options: SGDSettings) -> ChainOptimizer:
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(model, groups, chain=chain(Mean(), options.stage()))


NORMUON = Recipe(
    name="normuon",
    options=NorMuonSettings,
    build=_build_muon,
    summary="dense NorMuon: mean → momentum → polar → row_normalize → scale; mean → adam for the rest",
    source="NorMuon, arXiv 2510.05491",
)
SGD = Recipe(
    name="sgd",
    options=SGDSettings,
    build=_build_sgd,
    summary="dense momentum SGD: mean → momentum",
    source="Polyak (1964); Nesterov (1983)",
)
