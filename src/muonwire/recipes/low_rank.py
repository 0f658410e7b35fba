"""Low rank on the wire: approach E in its two forms (truncated SVD, power iteration), and Dion."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from muonwire.codec import parse
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import ScaleSettings, checked
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import DenseRestSettings, MuonSettings
from muonwire.recipes.means import MeansSettings
from muonwire.stages import EF14, Dion, Exchange, PowerSGD, chain


@dataclass(frozen=True, kw_only=True)
class LowRankSettings(MuonSettings):
    """Gradients of low rank.

    Args:
        rank: of the factors, at most the smaller dimension of a matrix. Default: 4.
        wire: how the factors are written, in a codec's textual form. Default: "bfloat16".
        feedback_decay: of what the factors leave out, in [0, 1]. Default: 1.
    """

    rank: int = 4
    wire: str = "bfloat16"
    feedback_decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TruncatedSettings(MeansSettings, LowRankSettings):
    """Options of approach_e.

    Args:
        svd: how each replica finds its factors: "svd", or "rsvd" and "power" of the codec's ``lowrank``. Default: "svd".
    """

    svd: str = "svd"

    @checked
    def truncated(self) -> Exchange:
        """Each replica's factors, multiplied and averaged by all, with error feedback."""
        codec = parse(f"lowrank(rank={self.rank}, method={self.svd}) | {self.wire}")
        return self.exchanged(codec, feedback=EF14(decay=self.feedback_decay))


@dataclass(frozen=True, kw_only=True)
class PowerSettings(LowRankSettings):
    """Options of powersgd_muon.

    Args:
        fraction: rank as a share of the smaller dimension, instead of ``rank``. Default: none.
        wire: dtype of the factors on the wire, "float32" or "bfloat16". Default: "bfloat16".
    """

    fraction: float | None = None
    wire: str = "bfloat16"

    @override
    def idle(self) -> Mapping[str, str]:
        replaced = {} if self.fraction is None else {"rank": "without fraction"}
        return {**super().idle(), **replaced}

    @checked
    def power(self) -> PowerSGD:
        """The stage with these settings."""
        return PowerSGD(rank=self.rank, fraction=self.fraction, wire=self.wire, decay=self.feedback_decay)


@dataclass(frozen=True, kw_only=True)
class DionSettings(DenseRestSettings, ScaleSettings):
    """Options of dion.

    Args:
        momentum: decay of the momentum that the factors are taken from, in [0, 1). Default: 0.95.
        fraction: rank as a share of a matrix's smaller dimension, in (0, 1]. Default: 0.25.
        wire: dtype of the factors on the wire, "float32" or "bfloat16". Default: "float32".
    """

    momentum: float = 0.95
    fraction: float = 0.25
    wire: str = "float32"

    @checked
    def power(self) -> Dion:
        """The stage with these settings."""
        return Dion(fraction=self.fraction, wire=self.wire, momentum=self.momentum)


@recipe(
    TruncatedSettings,
    summary="exchange(truncated SVD, EF14) of gradients → momentum → polar → scale; mean → adam for the rest",
    source="approach E of “Why Muon and DisTrO conflict”; the nearest matrix of a rank: Eckart and Young (1936)",
)
def approach_e(model: nn.Module, options: TruncatedSettings) -> ChainOptimizer:
    """Muon on gradients of which each replica sends the nearest matrix of low rank."""
    return options.with_dense_rest(model, chain(options.truncated(), options.polar_chain()))


@recipe(
    PowerSettings,
    summary="power iteration over the replicas with feedback → momentum → polar → scale; mean → adam for the rest",
    source="approach E of “Why Muon and DisTrO conflict”, by power iteration; PowerSGD, arXiv 1905.13727",
)
def powersgd_muon(model: nn.Module, options: PowerSettings) -> ChainOptimizer:
    """Muon on gradients of low rank, found by power iteration over all replicas."""
    return options.with_dense_rest(model, chain(options.power(), options.polar_chain()))


@recipe(
    DionSettings,
    summary="power iteration over the replicas' momenta, orthonormal factors as the update → scale; mean → adam for the rest",
    source="Dion, arXiv 2504.05295; “Coefficients and variance of Muon”",
)
def dion(model: nn.Module, options: DionSettings) -> ChainOptimizer:
    """Orthonormal updates of low rank, out of the replicas' momenta."""
    return options.with_dense_rest(model, chain(options.power(), options.scale_stage()))
