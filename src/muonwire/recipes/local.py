"""Local steps: an optimizer on each replica alone, and an exchange of the weight change every H steps."""

from dataclasses import dataclass

import torch
from torch import nn

from muonwire.codec import Codec, Pipeline, Sign, TopK, parse
from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.local_steps import LocalSteps
from muonwire.recipes.base import AdamSettings, Recipe
from muonwire.recipes.dense import MuonSettings, by_dimensions, muon_groups, named_group, trainable
from muonwire.stages import EF14, Chain, Exchange, Momentum, NoFeedback, chain
from muonwire.transport.base import Transport


@dataclass(frozen=True, kw_only=True)
class OuterSettings:
    """The options of every recipe with local steps.

    Args:
        interval: H, local steps a synchronization. Default: 5.
        growth: steps by which H grows with every step of the run. Default: 0.
        density: share of each matrix's entries that is sent, in (0, 1]. Default: 0.1.
        codec: of matrices, in textual form; replaces the default "topk(density=…) | sign(scale=tensor)".
        vector_codec: of biases and norms. Default: "sign(scale=tensor)".
        feedback: keep what the codecs drop for the next synchronization. Default: True.
        feedback_decay: of what is kept, in [0, 1]. Default: 0.9.
        over: what the exchange divides by: "replicas", or "senders", the replicas whose selection holds the entry.
            Default: "replicas".
        outer_lr: rate of the outer step. Default: 1.
        outer_momentum: of the outer step, in [0, 1); 0 is none. Default: 0.
        outer_nesterov: look ahead in the outer momentum. Default: True.
    """

    interval: int = 5
    growth: float = 0.0
    density: float = 0.1
    codec: str | None = None
    vector_codec: str = "sign(scale=tensor)"
    feedback: bool = True
    feedback_decay: float = 0.9
    over: str = "replicas"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    outer_nesterov: bool = True

    def check_outer(self) -> None:
        """Raise UsageError where an option is not allowed."""
        if self.interval < 1:
            raise UsageError(f"local steps: interval (H) is {self.interval}; it must be at least 1")
        if self.growth < 0:
            raise UsageError(f"local steps: growth is {self.growth}; it must be at least 0")
        if self.outer_lr <= 0:
            raise UsageError(f"local steps: outer_lr is {self.outer_lr}; it must be positive")
        self.outer_chain(self.matrix_codec())
        self.outer_chain(parse(self.vector_codec))

    def matrix_codec(self) -> Codec:
        """The codec of tensors of two or more dimensions."""
        if self.codec is not None:
            return parse(self.codec)
        return Pipeline(select=TopK(density=self.density), quantize=Sign(scale="tensor"))

    def outer_chain(self, through: Codec) -> Chain:
        """exchange(codec, feedback) → outer momentum."""
        feedback = EF14(decay=self.feedback_decay) if self.feedback else NoFeedback()
        exchanged = Exchange(codec=through, feedback=feedback, over=self.over)
        momentum = Momentum(beta=self.outer_momentum, nesterov=self.outer_nesterov, form="heavy_ball")
        return chain(exchanged, momentum) if self.outer_momentum else chain(exchanged)

    def around(self, inner: torch.optim.Optimizer, model: nn.Module, transport: Transport) -> LocalSteps:
        """Local steps of ``inner``, with these settings between the replicas."""
        named = trainable(model)
        matrices = [(n, p) for n, p in named if p.ndim >= 2]
        vectors = [(n, p) for n, p in named if p.ndim < 2]
        groups = [
            named_group("matrices", matrices, chain=self.outer_chain(self.matrix_codec())),
            named_group("vectors", vectors, chain=self.outer_chain(parse(self.vector_codec))),
        ]
        return LocalSteps(
            inner,
            [g for g in groups if g["params"]],
            interval=self.interval,
            growth=self.growth,
            outer_lr=self.outer_lr,
            transport=transport,
        )


@dataclass(frozen=True, kw_only=True)
class LocalMuonSettings(OuterSettings, MuonSettings):
    """Options of local_muon: those of Muon, and those of local steps."""

    def __post_init__(self) -> None:
        MuonSettings.__post_init__(self)
        self.check_outer()


@dataclass(frozen=True, kw_only=True)
class LocalAdamSettings(OuterSettings, AdamSettings):
    """Options of local_adamw: those of AdamW, and those of local steps."""

    def __post_init__(self) -> None:
        self.check_outer()
        self.adam_stage()


def build_local_muon(
    model: nn.Module, lr: float, transport: Transport, options: LocalMuonSettings
) -> LocalSteps:
    """Muon inside."""
    inner = ChainOptimizer(muon_groups(model, lr, options, exchange_first=()), lr=lr)
    return options.around(inner, model, transport)


def build_local_adamw(
    model: nn.Module, lr: float, transport: Transport, options: LocalAdamSettings
) -> LocalSteps:
    """AdamW inside."""
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.around(ChainOptimizer(groups, chain=chain(options.adam_stage()), lr=lr), model, transport)


LOCAL_MUON = Recipe(
    name="local_muon",
    options=LocalMuonSettings,
    build=build_local_muon,
    summary="inner: momentum → polar → scale; every H steps: exchange(codec, feedback) of the weight change → outer momentum",
    source="MuLoCo and DiLoCo (arXiv 2311.08105) with sparse 1-bit weight changes",
)
LOCAL_ADAMW = Recipe(
    name="local_adamw",
    options=LocalAdamSettings,
    build=build_local_adamw,
    summary="inner: adam; every H steps: exchange(codec, feedback) of the weight change → outer momentum",
    source="DiLoCo, arXiv 2311.08105, with sparse 1-bit weight changes",
)
