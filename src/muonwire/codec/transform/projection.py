"""A random projection: a rotation of each block, and a random share of its coefficients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import random
from muonwire.codec.host import send
from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.base import Transform
from muonwire.codec.transform.hadamard import Hadamard


@dataclass(frozen=True, kw_only=True)
class Projection(Transform):
    """Random projection of each block of n entries to d: y = S x with S = R H D / √n, R a random choice of d rows.

    The subsampled randomized Hadamard transform: Gaussian or sparse projections of the same size lose the same share of a tensor,
    but a Gaussian one is a matrix product, which rounds differently from machine to machine, and the rows of a sparse one are
    not orthogonal, so that its transpose is not its pseudo-inverse. This one has orthonormal rows, costs n log₂ n additions
    and decodes alike everywhere. R is the same for all blocks of a round, D is not.

    It differs from ``hadamard | randomk`` in that its coefficients are whole blocks for what follows, a selection among them.

    Args:
        density: d / n, in (0, 1]; d is at least 1. Default: 0.25.
        block: largest block, entries, chosen as in ``hadamard``. Default: 1024.
        decode: "least_squares": Sᵀ y, the part of x in the span of S's rows, of which feedback keeps the rest; "unbiased":
            (n / d) Sᵀ y, whose expectation over seeds is x, with a squared error of about n / d − 1 times ‖x‖², for use without
            feedback. Default: "least_squares".

    Source: Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2009); Tropp, "Improved analysis of the subsampled
    randomized Hadamard transform", arXiv 1011.1595.
    """

    name: ClassVar[str] = "projection"
    seeded: ClassVar[bool] = True
    density: float = 0.25
    block: int = 1024
    decode: str = "least_squares"

    def __post_init__(self) -> None:
        self.check_share("density")
        self.check_count("block")
        self.check_choice("decode", ("least_squares", "unbiased"))

    @property
    def _rotation(self) -> Hadamard:
        return Hadamard(block=self.block)

    def _kept(self, block_numel: int) -> int:
        return min(block_numel, max(1, round(self.density * block_numel)))

    @override
    def grid(self, shape: Shape) -> tuple[int, int]:
        num_blocks, block_numel = self._rotation.grid(shape)
        return num_blocks, self._kept(block_numel)

    @override
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        rotated = self._rotation.forward(tensor, now)
        return rotated.index_select(1, send(self._rows(rotated.shape[1], now.seed), rotated.device))

    @override
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        num_blocks, block_numel = self._rotation.grid(shape)
        rotated = torch.zeros(num_blocks, block_numel, dtype=blocks.dtype, device=blocks.device)
        scale = block_numel / max(blocks.shape[1], 1) if self.decode == "unbiased" else 1.0
        rotated.index_copy_(1, send(self._rows(block_numel, seed), blocks.device), blocks * scale)
        return self._rotation.inverse(rotated, shape, seed=seed)

    def _rows(self, block_numel: int, seed: int) -> Tensor:
        return random.subsets(seed, "projection", 1, block_numel, self._kept(block_numel))
