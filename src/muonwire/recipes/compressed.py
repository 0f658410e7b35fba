"""What the recipes share that compress every step: DisTrO's codec, and the two groups of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from muonwire.codec import Codec, parse
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.dense import MuonSettings, by_dimensions, named_group
from muonwire.stages import EF14, Chain, Exchange, ResidualMomentum, Scale, Sign, Stage, chain

CODEC = "dct(chunk=64) | topk(k=32) | sign(scale=chunk)"


@dataclass(frozen=True, kw_only=True)
class CompressedSettings(MuonSettings):
    """Options of the recipes that compress every step; those of Muon are inherited.

    Args:
        codec: in textual form. Default: "dct(chunk=64) | topk(k=32) | sign(scale=chunk)", DisTrO's with a scale a chunk.
        residual_decay: of the residual momentum, in [0, 1]. Default: 0.999.
        feedback_decay: of error feedback, in [0, 1]. Default: 1.
        rest_rms: root mean square of the sign updates of parameters that are not orthogonalized, over the learning rate.
            Default: 0.2, that of a polar factor with scale "rms".
    """

    codec: str = CODEC
    residual_decay: float = 0.999
    feedback_decay: float = 1.0
    rest_rms: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.distro()
        self.fed_back()

    def parsed_codec(self) -> Codec:
        """The codec."""
        return parse(self.codec)

    def residual(self) -> Exchange:
        """Residual momentum and its compressed exchange, averaged over the senders of each entry, as DeMo has it."""
        feedback = ResidualMomentum(decay=self.residual_decay)
        return Exchange(codec=self.parsed_codec(), feedback=feedback, over="senders")

    def fed_back(self) -> Exchange:
        """Compressed exchange of what comes in, with error feedback."""
        return Exchange(codec=self.parsed_codec(), feedback=EF14(decay=self.feedback_decay))

    def distro(self) -> Chain:
        """DisTrO at ``rest_rms``."""
        return chain(self.residual(), Sign(), Scale(kind="none", factor=self.rest_rms))


def two_groups(
    model: nn.Module,
    settings: MuonSettings,
    *,
    hidden: Stage,
    rest: Stage,
    rest_rate: float = 1.0,
) -> ChainOptimizer:
    """An optimizer that gives hidden matrices one chain, and all other parameters another.

    Args:
        model: its trainable parameters.
        settings: routing and weight decay.
        hidden: chain of the parameters that routing sends to polar.
        rest: chain of the others.
        rest_rate: their learning rate over that of the settings. Default: 1.
    """
    routing = settings.routing(model)
    groups = [hidden_group([(r.name, r.param, str(r.layout)) for r in routing.polar], hidden, settings)]
    groups += by_dimensions(
        "other",
        [(r.name, r.param) for r in routing.adam],
        weight_decay=settings.weight_decay,
        chain=rest,
        lr=settings.lr * rest_rate,
    )
    return settings.optimizer(model, groups)


def hidden_group(
    routes: Sequence[tuple[str, Tensor, str]], stage: Stage, settings: MuonSettings, name: str = "hidden"
) -> dict[str, Any]:
    """The group of hidden matrices: (name, parameter, layout) of each."""
    return named_group(
        name,
        [(n, p) for n, p, _ in routes],
        chain=stage,
        layouts=[layout for _, _, layout in routes],
        weight_decay=settings.weight_decay,
    )
