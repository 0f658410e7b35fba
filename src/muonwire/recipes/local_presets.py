"""Published methods with local steps: MuLoCo, DiLoCo and SparseLoCo."""

from dataclasses import dataclass

from muonwire.recipes.base import Recipe
from muonwire.recipes.local import (
    LocalAdamSettings,
    LocalMuonSettings,
    build_local_adamw,
    build_local_muon,
)


@dataclass(frozen=True, kw_only=True)
class MuLoCoSettings(LocalMuonSettings):
    """Options of muloco: those of local_muon, with MuLoCo's defaults; ``density`` has no use where a codec is given.

    Args:
        interval: H, local steps a synchronization. Default: 30.
        codec: of matrices. Default: "codebook(bits=2)", every entry as the nearest of four levels fitted to the tensor.
        vector_codec: of biases and norms. Default: "codebook(bits=2)".
        outer_lr: Default: 0.8.
        outer_momentum: Nesterov's. Default: 0.5.
    """

    interval: int = 30
    codec: str | None = "codebook(bits=2)"
    vector_codec: str = "codebook(bits=2)"
    outer_lr: float = 0.8
    outer_momentum: float = 0.5


@dataclass(frozen=True, kw_only=True)
class DiLoCoSettings(LocalAdamSettings):
    """Options of diloco: those of local_adamw, with DiLoCo's defaults; ``density`` has no use where a codec is given.

    Args:
        interval: H, local steps a synchronization. Default: 30; the paper's is 500, for runs of tens of thousands of steps.
        codec: of matrices. Default: "float32".
        vector_codec: of biases and norms. Default: "float32".
        feedback: Default: False, since nothing is dropped.
        outer_lr: Default: 0.7.
        outer_momentum: Nesterov's. Default: 0.9.
    """

    interval: int = 30
    codec: str | None = "float32"
    vector_codec: str = "float32"
    feedback: bool = False
    outer_lr: float = 0.7
    outer_momentum: float = 0.9


@dataclass(frozen=True, kw_only=True)
class SparseLoCoSettings(LocalAdamSettings):
    """Options of sparseloco: those of local_adamw, with SparseLoCo's defaults; ``density`` has no use where a codec is given.

    Error feedback stands in for the outer momentum: what is kept for later rounds decays as a momentum would.

    Args:
        interval: H, local steps a synchronization. Default: 30.
        codec: of matrices. Default: 64 entries (1.6 %) of each 64 × 64, two bits each.
        vector_codec: of biases and norms. Default: "codebook(bits=2)"; chunks of 64 entries would be sent whole anyway.
        feedback_decay: Default: 0.95.
        over: Default: "replicas", as the paper has it; its published code divides by the "senders".
    """

    interval: int = 30
    codec: str | None = "tiles(chunk=64) | topk(k=64) | codebook(bits=2)"
    vector_codec: str = "codebook(bits=2)"
    feedback_decay: float = 0.95


MULOCO = Recipe(
    name="muloco",
    options=MuLoCoSettings,
    build=build_local_muon,
    summary="inner: momentum → polar → scale; every 30 steps: exchange(2-bit codebook, feedback) of the weight change → Nesterov",
    source="MuLoCo, arXiv 2505.23725, algorithm 1",
)
DILOCO = Recipe(
    name="diloco",
    options=DiLoCoSettings,
    build=build_local_adamw,
    summary="inner: adam; every 30 steps: exchange(float32) of the weight change → Nesterov",
    source="DiLoCo, arXiv 2311.08105, algorithm 1",
)
SPARSELOCO = Recipe(
    name="sparseloco",
    options=SparseLoCoSettings,
    build=build_local_adamw,
    summary="inner: adam; every 30 steps: exchange(tiles, top-k, 2-bit codebook, feedback) of the weight change",
    source="SparseLoCo, arXiv 2508.15706, algorithm 1",
)
