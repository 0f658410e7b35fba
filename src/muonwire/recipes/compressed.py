"""What the recipes that compress every step share: DisTrO's codec, and the exchanges with it."""

from dataclasses import dataclass

from torch import nn

from muonwire.codec import Codec, parse
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import RoutedSettings, checked
from muonwire.recipes.means import MeansSettings
from muonwire.stages import EF14, Chain, Exchange, ResidualMomentum, Scale, Sign, Stage, chain

CODEC = "dct(chunk=64) | topk(k=32) | sign(scale=chunk)"


@dataclass(frozen=True, kw_only=True)
class CodecSettings(MeansSettings):
    """The codec of an exchange in every step.

    Args:
        codec: in textual form. Default: "dct(chunk=64) | topk(k=32) | sign(scale=chunk)", DisTrO's with a scale a chunk.
    """

    codec: str = CODEC

    @checked
    def parsed_codec(self) -> Codec:
        """The codec."""
        return parse(self.codec)


@dataclass(frozen=True, kw_only=True)
class FedBackSettings(CodecSettings):
    """A compressed exchange with error feedback.

    Args:
        feedback_decay: of error feedback, in [0, 1]. Default: 1.
    """

    feedback_decay: float = 1.0

    @checked
    def fed_back(self) -> Exchange:
        """The compressed exchange of an update, with error feedback."""
        return self.exchanged(self.parsed_codec(), feedback=EF14(decay=self.feedback_decay))


@dataclass(frozen=True, kw_only=True)
class CompressedSettings(CodecSettings, RoutedSettings):
    """A compressed exchange of hidden matrices, and DisTrO for the rest.

    Args:
        residual_decay: of the residual momentum, in [0, 1]. Default: 0.999.
        rest_rms: root mean square of the sign updates of parameters that are not orthogonalized, over the learning rate.
            Default: 0.2, that of a polar factor with scale "rms".
    """

    residual_decay: float = 0.999
    rest_rms: float = 0.2

    def residual(self) -> Exchange:
        """Residual momentum and its compressed exchange, averaged over the senders of each entry, as DeMo has it."""
        feedback = ResidualMomentum(decay=self.residual_decay)
        return self.exchanged(self.parsed_codec(), feedback=feedback, over="senders")

    @checked
    def distro_chain(self) -> Chain:
        """DisTrO at ``rest_rms``."""
        return chain(self.residual(), Sign(), Scale(kind="none", factor=self.rest_rms))

    def with_distro_rest(self, model: nn.Module, hidden: Stage) -> ChainOptimizer:
        """An optimizer with this chain for hidden matrices, and DisTrO for all other parameters."""
        return self.routed(model, hidden=hidden, rest=self.distro_chain())
