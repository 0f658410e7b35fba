"""Published methods with local steps: MuLoCo, DiLoCo and SparseLoCo."""

from dataclasses import dataclass

from torch import nn

from muonwire.optim.auto_interval import Interval
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.define import recipe
from muonwire.recipes.local import LocalAdamSettings, LocalMuonSettings, with_adam_inside, with_muon_inside


@dataclass(frozen=True, kw_only=True)
class MuLoCoSettings(LocalMuonSettings):
    """Options of muloco, with MuLoCo's defaults.

    Args:
        codec: of matrices. Default: "codebook(bits=2)", every entry as the nearest of four levels fitted to the tensor.
    """

    interval: Interval = 30
    codec: str = "codebook(bits=2)"
    vector_codec: str = "codebook(bits=2)"
    outer_lr: float = 0.8
    outer_momentum: float = 0.5


@recipe(
    MuLoCoSettings,
    summary="inner: momentum → polar → scale; every 30 steps: exchange(2-bit codebook, feedback) of the weight change → Nesterov",
    source="MuLoCo, arXiv 2505.23725, algorithm 1",
)
def muloco(model: nn.Module, options: MuLoCoSettings) -> ChainOptimizer:
    """Local Muon with two bits an entry of the weight change."""
    return with_muon_inside(model, options)


@dataclass(frozen=True, kw_only=True)
class DiLoCoSettings(LocalAdamSettings):
    """Options of diloco, with DiLoCo's defaults.

    Args:
        interval: H, local steps a synchronization. Default: 30; the paper's is 500, for runs of tens of thousands of steps.
        feedback: keep what the codecs drop for the next synchronization. Default: False, since nothing is dropped.
    """

    interval: Interval = 30
    codec: str = "float32"
    vector_codec: str = "float32"
    feedback: bool = False
    outer_lr: float = 0.7
    outer_momentum: float = 0.9


@recipe(
    DiLoCoSettings,
    summary="inner: adam; every 30 steps: exchange(float32) of the weight change → Nesterov",
    source="DiLoCo, arXiv 2311.08105, algorithm 1",
)
def diloco(model: nn.Module, options: DiLoCoSettings) -> ChainOptimizer:
    """Local AdamW with whole weight changes."""
    return with_adam_inside(model, options)


@dataclass(frozen=True, kw_only=True)
class SparseLoCoSettings(LocalAdamSettings):
    """Options of sparseloco, with SparseLoCo's defaults.

    Args:
        codec: of matrices. Default: 64 entries (1.6 %) of each 64 × 64, two bits each.
        vector_codec: of biases and norms. Default: "codebook(bits=2)"; chunks of 64 entries would be sent whole anyway.
    """

    interval: Interval = 30
    codec: str = "tiles(chunk=64) | topk(k=64) | codebook(bits=2)"
    vector_codec: str = "codebook(bits=2)"
    feedback_decay: float = 0.95


@recipe(
    SparseLoCoSettings,
    summary="inner: adam; every 30 steps: exchange(tiles, top-k, 2-bit codebook, feedback) of the weight change",
    source="SparseLoCo, arXiv 2508.15706, algorithm 1",
)
def sparseloco(model: nn.Module, options: SparseLoCoSettings) -> ChainOptimizer:
    """Local AdamW with the largest entries of the weight change, two bits each.

    Error feedback stands in for the outer momentum: what is kept for later rounds decays as a momentum would. The mean is over all
    replicas, as the paper has it; its published code divides by the senders (``over="senders"``).
    """
    return with_adam_inside(model, options)
