"""DeMo's transform: a cosine transform of chunks of the matrix."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.base import Transform, matrix_shape
from muonwire.errors import UsageError


@lru_cache(maxsize=1024)
def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``.

    >>> largest_divisor(384, 64), largest_divisor(101, 64)
    (64, 1)
    """
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


@lru_cache(maxsize=64)
def cosine_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal DCT-II: basis[k, i] = sqrt((1 + (k > 0)) / n) cos(π (2 i + 1) k / (2 n)); coefficients = basis @ x."""
    k = torch.arange(size, dtype=torch.float64).unsqueeze(1)
    i = torch.arange(size, dtype=torch.float64).unsqueeze(0)
    basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.to(dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Dct(Transform):
    """Chunked orthonormal DCT-II in both dimensions of the matrix; a vector is chunked in its one.

    The chunk's size in each dimension is the largest divisor of that dimension up to ``chunk``, so that nothing is padded.

    Args:
        chunk: largest chunk a dimension. Default: 64.

    Source: Peng et al., "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, section 3 and its published code.
    """

    name: ClassVar[str] = "dct"
    chunk: int = 64

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise UsageError(f"dct: chunk is {self.chunk}; it must be at least 1")

    def _chunks(self, shape: Shape) -> tuple[int, int, int, int]:
        rows, columns = matrix_shape(shape)
        height, width = (
            largest_divisor(max(rows, 1), self.chunk),
            largest_divisor(max(columns, 1), self.chunk),
        )
        return rows // height, height, columns // width, width

    def grid(self, shape: Shape) -> tuple[int, int]:
        """See Transform.grid."""
        num_rows, height, num_columns, width = self._chunks(shape)
        return num_rows * num_columns, height * width

    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        """See Transform.forward."""
        num_rows, height, num_columns, width = self._chunks(tuple(tensor.shape))
        chunks = tensor.reshape(num_rows, height, num_columns, width).transpose(1, 2)
        left = cosine_basis(height, tensor.dtype, tensor.device)
        right = cosine_basis(width, tensor.dtype, tensor.device)
        return (left @ chunks @ right.mT).reshape(num_rows * num_columns, height * width)

    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        """See Transform.inverse."""
        num_rows, height, num_columns, width = self._chunks(shape)
        left = cosine_basis(height, blocks.dtype, blocks.device)
        right = cosine_basis(width, blocks.dtype, blocks.device)
        chunks = left.mT @ blocks.reshape(num_rows, num_columns, height, width) @ right
        return chunks.transpose(1, 2).reshape(shape)
