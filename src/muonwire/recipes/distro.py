"""DisTrO: compressed momentum, then its sign."""

from dataclasses import dataclass

from torch import nn

from muonwire import codec
from muonwire.exchange.base import Exchange
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import Recipe
from muonwire.recipes.dense import by_dimensions, trainable
from muonwire.stages import Exchange as ExchangeStage
from muonwire.stages import ResidualMomentum, Sign, chain


@dataclass(frozen=True, kw_only=True)
class DistroSettings:
    """Options of distro.

    Args:
        k: coefficients sent of each chunk. Default: 32.
        chunk: largest chunk a dimension. Default: 64.
        scale: of the 1-bit values: "none" sends signs alone, as Psyche; "chunk" and "tensor" send a mean magnitude too.
        decay: of the residual momentum, in [0, 1]. Default: 0.999.
        subtract: what the residual loses: "selected", the entries before quantization, as Psyche; or "decoded", which keeps
            the 1-bit error and needs a scale. Default: "selected".
        weight_decay: decoupled, on tensors of two or more dimensions only. Default: 0.01.
    """

    k: int = 32
    chunk: int = 64
    scale: str = "none"
    decay: float = 0.999
    subtract: str = "selected"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        self.stage()

    def stage(self) -> ExchangeStage:
        """The residual momentum and its compressed exchange."""
        return ExchangeStage(
            codec=codec.Pipeline(
                transform=codec.Dct(chunk=self.chunk),
                select=codec.TopK(k=self.k),
                quantize=codec.Sign(scale=self.scale),
            ),
            feedback=ResidualMomentum(decay=self.decay, subtract=self.subtract),
            over="senders",
        )


def _build(model: nn.Module, lr: float, exchange: Exchange, options: DistroSettings) -> ChainOptimizer:
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return ChainOptimizer(groups, chain=chain(options.stage(), Sign()), lr=lr, exchange=exchange)


DISTRO = Recipe(
    name="distro",
    options=DistroSettings,
    build=_build,
    summary="source 0's baseline: residual momentum + exchange(dct, top-k, 1-bit) → sign",
    source="DeMo, arXiv 2411.19870, with Psyche's 1-bit values",
)
