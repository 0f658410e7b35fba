"""Muon behind a compressed exchange of gradients with error feedback, and with signs alone."""

from dataclasses import dataclass

from torch import nn

from muonwire.codec import parse
from muonwire.errors import UsageError
from muonwire.exchange.base import Exchange
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import Recipe
from muonwire.recipes.compressed import CompressedSettings, two_groups
from muonwire.stages import Exchange as ExchangeStage
from muonwire.stages import Scale, Sign, chain


def _ef14_muon(
    model: nn.Module, lr: float, exchange: Exchange, options: CompressedSettings
) -> ChainOptimizer:
    hidden = chain(options.fed_back(), options.polar_chain())
    rest = chain(options.fed_back(), options.adam_stage())
    return two_groups(model, lr, exchange, options, hidden=hidden, rest=rest, rest_rate=options.adam_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class SignMuonSettings(CompressedSettings):
    """Options of signmuon; those of the compressed recipes are inherited.

    Args:
        codec: one bit a value; it must not select or scale. Default: "sign(scale=none)".
    """

    codec: str = "sign(scale=none)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec != "sign(scale=none)":
            raise UsageError(f"signmuon: codec is {self.codec!r}; a majority vote takes sign(scale=none)")


def _signmuon(model: nn.Module, lr: float, exchange: Exchange, options: SignMuonSettings) -> ChainOptimizer:
    vote = chain(
        ExchangeStage(codec=parse(options.codec)), Sign(), Scale(kind="none", factor=options.rest_rms)
    )
    return two_groups(
        model,
        lr,
        exchange,
        options,
        hidden=chain(options.momentum_stage(), options.polar_stage(), vote),
        rest=chain(options.momentum_stage(), vote),
    )


EF14_MUON = Recipe(
    name="ef14_muon",
    options=CompressedSettings,
    build=_ef14_muon,
    summary="exchange(codec, EF14) of gradients → momentum → polar → scale; exchange(codec, EF14) → adam for the rest",
    source="EF14: Seide et al. (2014), arXiv 1901.09847",
)
SIGNMUON = Recipe(
    name="signmuon",
    options=SignMuonSettings,
    build=_signmuon,
    summary="momentum → polar → exchange(1-bit) → majority vote; momentum → exchange(1-bit) → majority vote for the rest",
    source="signSGD with majority vote, arXiv 1810.05291, on polar factors",
)
