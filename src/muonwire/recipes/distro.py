"""DeMo, and the DisTrO that Psyche made of it: compressed momentum, then its sign."""

from dataclasses import dataclass

from torch import nn

from muonwire import codec
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import Recipe, RecipeSettings
from muonwire.recipes.dense import by_dimensions, trainable
from muonwire.stages import Delayed, Exchange, ResidualMomentum, Sign, Stage, chain


@dataclass(frozen=True, kw_only=True)
class DistroSettings(RecipeSettings):
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
        super().__post_init__()
        self.stage()

    def stage(self) -> Exchange:
        """The residual momentum and its compressed exchange."""
        return Exchange(
            codec=codec.Pipeline(
                transform=codec.Dct(chunk=self.chunk),
                select=codec.TopK(k=self.k),
                quantize=codec.Sign(scale=self.scale),
            ),
            feedback=ResidualMomentum(decay=self.decay, subtract=self.subtract),
            over="senders",
        )


@dataclass(frozen=True, kw_only=True)
class DemoSettings(RecipeSettings):
    """Options of demo.

    Args:
        k: coefficients sent of each chunk. Default: 32.
        chunk: largest chunk a dimension. Default: 64.
        values: how the coefficients are written, in a codec's textual form. Default: "float32", as they are.
        decay: of the residual momentum, in [0, 1]. Default: 0.999.
        weight_decay: decoupled, on tensors of two or more dimensions only. Default: 0.01.
    """

    k: int = 32
    chunk: int = 64
    values: str = "float32"
    decay: float = 0.999
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stage()

    def stage(self) -> Exchange:
        """The residual momentum and its exchange."""
        return Exchange(
            codec=codec.parse(f"dct(chunk={self.chunk}) | topk(k={self.k}) | {self.values}"),
            feedback=ResidualMomentum(decay=self.decay),
            over="senders",
        )


@dataclass(frozen=True, kw_only=True)
class PsycheSettings(DistroSettings):
    """Options of psyche; those of distro are inherited.

    Args:
        look_ahead: take gradients at θ − lr · sign(δ), with δ the replica's residual and lr the last step's rate. Default: True.
        delayed: apply what an exchange gave in the next step. Default: False.
    """

    look_ahead: bool = True
    delayed: bool = False


def _build(model: nn.Module, options: DistroSettings | DemoSettings) -> ChainOptimizer:
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(model, groups, chain=chain(options.stage(), Sign()))


def _psyche(model: nn.Module, options: PsycheSettings) -> ChainOptimizer:
    compressed: Stage = Delayed(through=options.stage()) if options.delayed else options.stage()
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    inside = ("delayed", "through") if options.delayed else ("exchange",)
    return options.optimizer(
        model,
        groups,
        chain=chain(compressed, Sign()),
        look_ahead=(*inside, "residual") if options.look_ahead else (),
    )


DISTRO = Recipe(
    name="distro",
    options=DistroSettings,
    build=_build,
    summary="source 0's baseline: residual momentum + exchange(dct, top-k, 1-bit) → sign",
    source="DeMo, arXiv 2411.19870, with Psyche's 1-bit values",
)
DEMO = Recipe(
    name="demo",
    options=DemoSettings,
    build=_build,
    summary="residual momentum + exchange(dct, top-k, float32, mean over senders) → sign",
    source="DeMo, arXiv 2411.19870, algorithm 1",
)
PSYCHE = Recipe(
    name="psyche",
    options=PsycheSettings,
    build=_psyche,
    summary="residual momentum + exchange(dct, top-k, 1-bit) → sign, with gradients looked ahead by the residual's sign",
    source="DeMo, arXiv 2411.19870, as Psyche's distro.rs has it",
)
