"""DeMo and its 1-bit variant DisTrO, as Psyche runs it: compressed momentum, then its sign."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from typing_extensions import override

from muonwire import codec
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import checked
from muonwire.recipes.define import recipe
from muonwire.recipes.means import MeansSettings
from muonwire.stages import Delayed, Exchange, ResidualMomentum, Sign, Stage, chain


@dataclass(frozen=True, kw_only=True)
class ResidualSettings(MeansSettings):
    """DeMo's residual momentum and its compressed exchange.

    Args:
        k: coefficients sent of each chunk. Default: 32.
        chunk: largest chunk a dimension. Default: 64.
        decay: of the residual momentum, in [0, 1]. Default: 0.999.
    """

    k: int = 32
    chunk: int = 64
    decay: float = 0.999

    def exchange(self, values: str, *, subtract: str = "decoded") -> Exchange:
        """The stage: the coefficients travel as ``values``, a codec's textual form; ``subtract`` as ResidualMomentum has it."""
        return self.exchanged(
            codec.parse(f"dct(chunk={self.chunk}) | topk(k={self.k}) | {values}"),
            feedback=ResidualMomentum(decay=self.decay, subtract=subtract),
            over="senders",
        )


@dataclass(frozen=True, kw_only=True)
class DistroSettings(ResidualSettings):
    """Options of distro.

    Args:
        scale: of the 1-bit values: "none" sends signs alone, as Psyche; "chunk" and "tensor" send a mean magnitude too.
        subtract: what the residual loses: "selected", the entries before quantization, as Psyche; or "decoded", which keeps
            the 1-bit error and needs a scale. Default: "selected".
    """

    scale: Literal["none", "chunk", "tensor"] = "none"
    subtract: Literal["decoded", "selected"] = "selected"

    @checked
    def stage(self) -> Exchange:
        """The residual momentum and its exchange with one bit a coefficient."""
        return self.exchange(f"sign(scale={self.scale})", subtract=self.subtract)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(ResidualSettings):
    """Options of demo.

    Args:
        values: how the coefficients are written, in a codec's textual form. Default: "float32", as they are.
    """

    values: str = "float32"

    @checked
    def stage(self) -> Exchange:
        """The residual momentum and its exchange."""
        return self.exchange(self.values)


@dataclass(frozen=True, kw_only=True)
class PsycheSettings(DistroSettings):
    """Options of psyche.

    Args:
        look_ahead: take gradients at θ − lr · sign(δ), with δ the replica's residual and lr the last step's rate. Default: True.
        delayed: apply what an exchange gave in the next step. Default: False.
    """

    look_ahead: bool = True
    delayed: bool = False

    @override
    def idle(self) -> Mapping[str, str]:
        # Weights with a look-ahead are always kept in float32.
        return {**super().idle(), **({"masters": "with look_ahead=False"} if self.look_ahead else {})}


@recipe(
    DistroSettings,
    summary="residual momentum + exchange(dct, top-k, 1-bit) → sign",
    source="DeMo, arXiv 2411.19870, with Psyche's 1-bit values",
)
def distro(model: nn.Module, options: DistroSettings) -> ChainOptimizer:
    """Compressed momentum, then its sign, with one bit a coefficient."""
    return options.uniform(model, chain(options.stage(), Sign()))


@recipe(
    DemoSettings,
    summary="residual momentum + exchange(dct, top-k, float32, mean over senders) → sign",
    source="DeMo, arXiv 2411.19870, algorithm 1",
)
def demo(model: nn.Module, options: DemoSettings) -> ChainOptimizer:
    """Compressed momentum, then its sign, with whole coefficients."""
    return options.uniform(model, chain(options.stage(), Sign()))


@recipe(
    PsycheSettings,
    summary="residual momentum + exchange(dct, top-k, 1-bit) → sign, with gradients taken ahead by the residual's sign",
    source="DeMo, arXiv 2411.19870, as Psyche's distro.rs has it",
)
def psyche(model: nn.Module, options: PsycheSettings) -> ChainOptimizer:
    """DisTrO whose gradients are taken at weights moved by what the replica has not sent yet."""
    exchange: Stage = Delayed(through=options.stage()) if options.delayed else options.stage()
    residual = ("delayed", "through", "residual") if options.delayed else ("exchange", "residual")
    return options.uniform(model, chain(exchange, Sign()), look_ahead=residual if options.look_ahead else ())
