"""Muon with error feedback (EF14, EF21), and Muon by majority vote on signs."""

from dataclasses import dataclass

from torch import nn

from muonwire.codec import Pipeline
from muonwire.codec import Sign as OneBit
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import MomentumSettings, PolarSettings, RoutedSettings, checked
from muonwire.recipes.compressed import CODEC, CodecSettings, FedBackSettings
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import MuonSettings
from muonwire.recipes.means import MeansSettings
from muonwire.stages import EF21, Chain, Exchange, Scale, Sign, chain


@dataclass(frozen=True, kw_only=True)
class EF14MuonSettings(FedBackSettings, MuonSettings):
    """Options of ef14_muon."""


@recipe(
    EF14MuonSettings,
    summary="exchange(codec, EF14) of gradients → momentum → polar → scale; exchange(codec, EF14) → adam for the rest",
    source="EF14: Seide et al. (2014), arXiv 1901.09847",
)
def ef14_muon(model: nn.Module, options: EF14MuonSettings) -> ChainOptimizer:
    """Muon on gradients that travel compressed, with error feedback."""
    return options.optimizer(model, options.muon_groups(model, options.fed_back()))


@dataclass(frozen=True, kw_only=True)
class EF21MuonSettings(CodecSettings, MuonSettings):
    """Options of ef21_muon.

    Args:
        codec: in textual form. EF21 needs a codec whose decoded value is nearer to the signal than zero is: one with a scale.
        nesterov: look ahead. Default: False, as the paper has it.
    """

    codec: str = CODEC
    nesterov: bool = False

    @checked
    def estimated(self) -> Exchange:
        """The mean of the replicas' estimates, which compressed differences move."""
        return self.exchanged(self.parsed_codec(), feedback=EF21())


@recipe(
    EF21MuonSettings,
    summary="momentum → exchange(codec, EF21) → polar → scale; exchange(codec, EF21) → adam for the rest",
    source="EF21-Muon, arXiv 2510.00643, algorithm 1, the way back uncompressed; Adam on the estimate for the rest",
)
def ef21_muon(model: nn.Module, options: EF21MuonSettings) -> ChainOptimizer:
    """Muon on estimates of the replicas' momenta, which compressed differences move."""
    hidden = chain(
        options.momentum_stage(), options.estimated(), options.polar_stage(), options.scale_stage()
    )
    rest = chain(options.estimated(), options.adam_stage())
    return options.routed(model, hidden=hidden, rest=rest, rest_rate=options.adam_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class SignMuonSettings(MeansSettings, RoutedSettings, PolarSettings, MomentumSettings):
    """Options of signmuon.

    Args:
        rms: root mean square of the updates, over the learning rate. Default: 0.2, that of a polar factor with scale "rms".
    """

    rms: float = 0.2

    @checked
    def vote(self) -> Chain:
        """One bit a value from each replica, and the majority's sign."""
        return chain(
            self.exchanged(Pipeline(quantize=OneBit(scale="none"))),
            Sign(),
            Scale(kind="none", factor=self.rms),
        )


@recipe(
    SignMuonSettings,
    summary="momentum → polar → exchange(1-bit) → majority vote; momentum → exchange(1-bit) → majority vote for the rest",
    source="signSGD with majority vote, arXiv 1810.05291, on polar factors",
)
def signmuon(model: nn.Module, options: SignMuonSettings) -> ChainOptimizer:
    """The majority's vote on the signs of the replicas' polar factors."""
    return options.routed(
        model,
        hidden=chain(options.momentum_stage(), options.polar_stage(), options.vote()),
        rest=chain(options.momentum_stage(), options.vote()),
    )
