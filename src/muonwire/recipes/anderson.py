"""GDA2: AdamW with Anderson mixing."""

from dataclasses import dataclass

from torch import nn

from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import AdamSettings, checked
from muonwire.recipes.define import recipe
from muonwire.stages import Anderson, Mean, chain


@dataclass(frozen=True, kw_only=True)
class GDA2Settings(AdamSettings):
    """Options of gda2.

    Args:
        history: differences that are mixed, at least 1. Default: 3.
        regularization: of the fit, in mean squares of the differences. Default: 10.
        decay: of that mean square, in [0, 1). Default: 0.9.
        cap: largest size of a mixed step over AdamW's. Default: 1.5.
    """

    history: int = 3
    regularization: float = 10.0
    decay: float = 0.9
    cap: float = 1.5

    @checked
    def anderson_stage(self) -> Anderson:
        """The stage with these settings."""
        return Anderson(
            history=self.history, regularization=self.regularization, decay=self.decay, cap=self.cap
        )


@recipe(
    GDA2Settings,
    summary="AdamW, its last steps mixed: mean → adam → anderson",
    source="“Why MuonFast fails on vision transformers”; Anderson (1965); arXiv 1606.04133",
)
def gda2(model: nn.Module, options: GDA2Settings) -> ChainOptimizer:
    """AdamW with Anderson mixing of its last steps."""
    return options.uniform(model, chain(Mean(), options.adam_stage(), options.anderson_stage()))
