"""Local steps: an optimizer on each replica alone, and an exchange of the weight change every H steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn
from typing_extensions import override

from muonwire.codec import Codec, Pipeline, Sign, TopK, parse
from muonwire.optim.auto_interval import AUTO, Interval
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.settings import LocalSteps
from muonwire.recipes.base import AdamSettings, checked
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import MuonSettings
from muonwire.recipes.describe import default_of
from muonwire.recipes.groups import by_dimensions, trainable
from muonwire.recipes.means import MeansSettings
from muonwire.stages import EF14, Chain, Momentum, NoFeedback, chain


@dataclass(frozen=True, kw_only=True)
class OuterSettings(MeansSettings):
    """Local steps, and the exchange of the weight change.

    Args:
        interval: H, local steps a synchronization; "auto", so that waiting stays below ``share`` of the time, beginning at the
            default; or the record of such a run: the path of its intervals.json, or pairs of a step and H from there on.
            Default: 5.
        share: with interval="auto", the largest share of the time that may go to waiting for exchange. Default: 0.05.
        intervals: with interval="auto", the least and the largest H. Default: 4 and 128.
        growth: steps by which H grows with every local step. Default: 0.
        codec: of matrices, in textual form. Default: "topk(density=0.1) | sign(scale=tensor)".
        vector_codec: of biases and norms. Default: "sign(scale=tensor)".
        feedback: keep what the codecs drop for the next synchronization. Default: True.
        feedback_decay: of what is kept, in [0, 1]. Default: 0.9.
        over: what the exchange divides by: "replicas", or "senders", the replicas whose selection holds the entry.
            Default: "replicas".
        lengthen: give the mean, which is shorter than the changes of replicas that disagree, their length (u ← u · ℓ / ‖u‖, ℓ that
            of their own changes in the mean, for each tensor). Default: False.
        outer_lr: rate of the outer step. Default: 1.
        outer_momentum: of the outer step, in [0, 1); 0 is none. Default: 0.
        outer_nesterov: look ahead in the outer momentum. Default: True.
        fragments: F, parts of the model that synchronize at different times, every H steps each. Default: 1.
        delay: local steps that go on while what a fragment has sent travels. Default: 0.
        mix: what replicas keep of those steps, in [0, 1]. Default: 0.5.
        merge: "fixed" merges after ``delay`` steps, "arrival" as soon as a result is there. Default: "fixed".
    """

    interval: Interval = 5
    share: float = 0.05
    intervals: Sequence[int] = (4, 128)
    growth: float = 0.0
    codec: str = "topk(density=0.1) | sign(scale=tensor)"
    vector_codec: str = "sign(scale=tensor)"
    feedback: bool = True
    feedback_decay: float = 0.9
    over: Literal["replicas", "senders"] = "replicas"
    lengthen: bool = False
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    outer_nesterov: bool = True
    fragments: int = 1
    delay: int = 0
    mix: float = 0.5
    merge: Literal["fixed", "arrival"] = "fixed"

    @override
    def idle(self) -> Mapping[str, str]:
        idle = dict(super().idle())
        if not self.feedback:
            idle["feedback_decay"] = "with feedback=True"
        if not self.outer_momentum:
            idle["outer_nesterov"] = "with an outer_momentum"
        if self.interval != AUTO:
            idle |= dict.fromkeys(("share", "intervals"), 'with interval="auto"')
        if not self.delay and self.merge == "fixed":
            idle["mix"] = "with a delay"
        return idle

    def matrix_codec(self) -> Codec:
        """The codec of tensors of two or more dimensions."""
        return parse(self.codec)

    @checked
    def outer_chains(self) -> list[Chain]:
        """exchange(codec, feedback) → outer momentum, of tensors of two or more dimensions and of the others."""
        feedback = EF14(decay=self.feedback_decay) if self.feedback else NoFeedback()
        codecs = (self.matrix_codec(), parse(self.vector_codec))
        exchanges = [
            self.exchanged(codec, feedback=feedback, over=self.over, lengthen=self.lengthen)
            for codec in codecs
        ]
        momentum = Momentum(beta=self.outer_momentum, nesterov=self.outer_nesterov, form="heavy_ball")
        return [chain(e, momentum) if self.outer_momentum else chain(e) for e in exchanges]

    @checked
    def local_steps(self) -> LocalSteps:
        """How many steps replicas take alone."""
        return LocalSteps(
            interval=self.interval,
            share=self.share,
            intervals=self.intervals,
            first_interval=self._first_interval(),
            growth=self.growth,
            outer_lr=self.outer_lr,
            fragments=self.fragments,
            delay=self.delay,
            mix=self.mix,
            merge=self.merge,
        )

    def usual_interval(self) -> int:
        """H where none is given."""
        (default,) = (default_of(f) for f in fields(self) if f.name == "interval")
        return int(default)

    def _first_interval(self) -> int | None:
        """With "auto" the recipe's own interval, or the bound that is nearest to it."""
        if self.interval != AUTO or len(self.intervals) != 2:
            return None
        least, most = self.intervals
        return min(max(self.usual_interval(), least), most)

    def with_outer_chains(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The groups, each parameter with its outer chain."""
        matrix, vector = self.outer_chains()
        return [
            {**g, "outer_chain": [matrix if p.ndim >= 2 else vector for p in g["params"]]} for g in groups
        ]


@dataclass(frozen=True, kw_only=True)
class SparseOuterSettings(OuterSettings):
    """The share of a matrix that the default codec sends.

    Args:
        density: share of each matrix's entries that is sent, in (0, 1], short for codec="topk(density=…) | sign(scale=tensor)".
            Default: none; the codec decides.
    """

    density: float | None = None

    @override
    def idle(self) -> Mapping[str, str]:
        replaced = {} if self.density is None else {"codec": "without density"}
        return {**super().idle(), **replaced}

    @override
    def matrix_codec(self) -> Codec:
        if self.density is None:
            return super().matrix_codec()
        return Pipeline(select=TopK(density=self.density), quantize=Sign(scale="tensor"))


@dataclass(frozen=True, kw_only=True)
class LocalMuonSettings(OuterSettings, MuonSettings):
    """Muon in the local steps."""


@dataclass(frozen=True, kw_only=True)
class SparseLocalMuonSettings(SparseOuterSettings, LocalMuonSettings):
    """Options of local_muon."""


@dataclass(frozen=True, kw_only=True)
class LocalAdamSettings(OuterSettings, AdamSettings):
    """AdamW in the local steps."""


@dataclass(frozen=True, kw_only=True)
class SparseLocalAdamSettings(SparseOuterSettings, LocalAdamSettings):
    """Options of local_adamw."""


def with_muon_inside(model: nn.Module, options: LocalMuonSettings) -> ChainOptimizer:
    """The optimizer whose local steps are Muon's."""
    groups = options.with_outer_chains(options.muon_groups(model))
    return options.optimizer(model, groups, local=options.local_steps())


def with_adam_inside(model: nn.Module, options: LocalAdamSettings) -> ChainOptimizer:
    """The optimizer whose local steps are AdamW's."""
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(
        model,
        options.with_outer_chains(groups),
        chain=chain(options.adam_stage()),
        local=options.local_steps(),
    )


@recipe(
    SparseLocalMuonSettings,
    summary="inner: momentum → polar → scale; every H steps: exchange(codec, feedback) of the weight change → outer momentum",
    source="MuLoCo and DiLoCo (arXiv 2311.08105) with sparse 1-bit weight changes",
)
def local_muon(model: nn.Module, options: SparseLocalMuonSettings) -> ChainOptimizer:
    """Muon on each replica alone for H steps, then an exchange of the weight changes."""
    return with_muon_inside(model, options)


@recipe(
    SparseLocalAdamSettings,
    summary="inner: adam; every H steps: exchange(codec, feedback) of the weight change → outer momentum",
    source="DiLoCo, arXiv 2311.08105, with sparse 1-bit weight changes",
)
def local_adamw(model: nn.Module, options: SparseLocalAdamSettings) -> ChainOptimizer:
    """AdamW on each replica alone for H steps, then an exchange of the weight changes."""
    return with_adam_inside(model, options)
