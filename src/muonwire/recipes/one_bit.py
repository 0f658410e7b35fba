"""The recipe that muonwire recommends: local Muon whose weight changes travel as one bit an entry."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn
from typing_extensions import override

from muonwire.codec import Turns
from muonwire.optim.auto_interval import Interval
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import checked
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import normalized_chain
from muonwire.recipes.local import LocalMuonSettings, with_muon_inside
from muonwire.stages import Chain


@dataclass(frozen=True, kw_only=True)
class OneBitMuonSettings(LocalMuonSettings):
    """Options of one_bit_muon, with the defaults that docs/one_bit_muon.md derives.

    Args:
        interval: H, local steps a synchronization. Default: 11, which is below 0.1 bit with headers. For 0.02 bit over 1500
            steps: 28, with growth=0.045 and outer_momentum=0.5.
        parts: F; in a synchronization each replica sends one of F parts of the entries, other replicas the others, in turns. So
            R / F of R replicas send an entry, which moves by their mean; nothing is kept for later. Bits are 1 / (F H), so H can
            be F times shorter, which gains with many replicas: at sixteen take parts=4, interval=3 and lengthen=True. Of fewer
            than F replicas each sends one of as many parts as there are replicas. Default: 1, all send all.
        codec: of matrices, without a selection with ``parts``. Default: "sign(scale=tensor)", the sign of every entry and one
            mean magnitude a tensor.
        normalize_rows: bring each polar factor's rows to about the same size over the steps, as NorMuon does. Default: False.
        row_beta2: with normalize_rows, decay of the rows' mean squares, in [0, 1). Default: 0.95.
        momentum: β of the local steps. Default: 0.9, less than dense Muon's, since the kept residual is momentum too.
        feedback_decay: of what is kept, in [0, 1]. Default: 0.5; what is older than a few rounds points to where the weights no
            longer are.
        outer_momentum: of the outer step, in [0, 1); 0 is none. Default: 0.3; 0.5 does better where H is several times larger.
        mean_prediction: see MeansSettings. Default: 0.5, at which recompressed means cost the least in loss (docs/owners.md).
    """

    interval: Interval = 11
    parts: int = 1
    codec: str = "sign(scale=tensor)"
    normalize_rows: bool = False
    row_beta2: float = 0.95
    momentum: float = 0.9
    feedback_decay: float = 0.5
    outer_lr: float = 0.9
    outer_momentum: float = 0.3
    mean_prediction: float = 0.5

    @override
    def idle(self) -> Mapping[str, str]:
        plain = {} if self.normalize_rows else {"row_beta2": "with normalize_rows=True"}
        turns = (
            dict.fromkeys(("feedback", "feedback_decay", "over"), "with parts=1") if self.parts > 1 else {}
        )
        return {**super().idle(), **plain, **turns}

    @checked
    @override
    def outer_chains(self) -> list[Chain]:
        """With ``parts`` the mean of those that sent an entry, and no feedback."""
        if self.parts == 1:
            return super().outer_chains()
        turns = replace(
            self,
            parts=1,
            codec=f"{Turns(parts=self.parts)} | {self.codec}",
            mean_codec=self.mean_codec or self.codec,
            feedback=False,
            over="senders",
        )
        return turns.outer_chains()

    @override
    def polar_chain(self) -> Chain:
        """momentum → polar → scale, with row_normalize before the scale where rows are normalized."""
        if self.normalize_rows:
            return normalized_chain(self, row_beta2=self.row_beta2)
        return super().polar_chain()


@recipe(
    OneBitMuonSettings,
    summary="inner: momentum → polar → scale; every 11 steps: exchange(1-bit, feedback) of the weight change → Nesterov",
    source="muonwire, docs/one_bit_muon.md; after MuLoCo, arXiv 2505.23725, and 1-bit SGD (2014)",
)
def one_bit_muon(model: nn.Module, options: OneBitMuonSettings) -> ChainOptimizer:
    """Local Muon whose weight changes travel as the sign of every entry: about 1/H bit per parameter and step.

    The learning rate is that of dense Muon or up to twice it.
    """
    return with_muon_inside(model, options)
