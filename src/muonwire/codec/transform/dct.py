"""DeMo's transform: a cosine transform of chunks of the matrix."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import CPU
from muonwire.codec.memory import strips, uninitialized
from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.chunks import Chunked

# Of fewer coefficients all chunks are transformed: the time is that of calls, not of products.
SMALLEST_CHOSEN = 1 << 10


@lru_cache(maxsize=64)
def cosine_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal DCT-II: basis[k, i] = sqrt((1 + (k > 0)) / n) cos(π (2 i + 1) k / (2 n)); coefficients = basis @ x."""
    k = torch.arange(size, dtype=torch.float64, device=CPU).unsqueeze(1)
    i = torch.arange(size, dtype=torch.float64, device=CPU).unsqueeze(0)
    basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    # It is kept, for streams of the device that do not wait for each other: so the host waits, once.
    return basis.to(dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Dct(Chunked):
    """Orthonormal DCT-II of each chunk, in both dimensions of the matrix; of a vector in its one.

    Args:
        chunk: largest chunk a dimension. Default: 64.

    Source: Peng et al., "DeMo: Decoupled Momentum Optimization", arXiv 2411.19870, section 3 and its published code.
    """

    name: ClassVar[str] = "dct"
    exact: ClassVar[bool] = False

    @override
    def largest_gain(self, shape: Shape) -> float:
        """No entry of the basis is above 1, so that the sum of a chunk's magnitudes bounds all sums."""
        return float(self.grid(shape)[1])

    @override
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        num_rows, height, num_columns, width = self._chunks(tuple(tensor.shape))
        if not tensor.numel():
            return tensor.reshape(num_rows * num_columns, height * width)
        left, right = self._bases(height, width, tensor)
        rows = tensor.reshape(num_rows, height, num_columns * width)
        out = uninitialized(num_rows, num_columns * height, width, dtype=tensor.dtype, device=tensor.device)
        for strip in strips(num_rows, height * num_columns * width, device=out.device):
            by_chunk = (left @ rows[strip]).view(-1, height, num_columns, width).transpose(1, 2)
            torch.mm(by_chunk.reshape(-1, width), right.mT, out=out[strip].view(-1, width))
        return out.view(num_rows * num_columns, height * width)

    @override
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        num_rows, height, num_columns, width = self._chunks(shape)
        if not blocks.numel():
            return blocks.reshape(shape)
        left, right = self._bases(height, width, blocks)
        coefficients = blocks.reshape(num_rows, num_columns * height, width)
        out = uninitialized(num_rows, height, num_columns, width, dtype=blocks.dtype, device=blocks.device)
        for strip in strips(num_rows, height * num_columns * width, device=out.device):
            by_chunk = (coefficients[strip] @ right).view(-1, num_columns, height, width).transpose(1, 2)
            torch.matmul(left.mT, by_chunk.flatten(2), out=out[strip].flatten(2))
        return out.view(shape)

    @override
    def inverse_chosen(
        self, values: Tensor, positions: Tensor, shape: Shape, *, per_block: int | None, seed: int
    ) -> Tensor:
        """Lᵀ diag(v) R: k coefficients a chunk cost k/(height + width) of the products that all coefficients take."""
        num_rows, height, num_columns, width = self._chunks(shape)
        small = values.numel() < SMALLEST_CHOSEN
        if small or per_block is None or per_block > min(height, width):
            return super().inverse_chosen(values, positions, shape, per_block=per_block, seed=seed)
        left, right = self._bases(height, width, values)
        inside = positions.view(num_rows, -1) % (height * width)
        row, column = inside // width, inside % width
        out = uninitialized(num_rows, height, num_columns, width, dtype=values.dtype, device=values.device)
        for strip in strips(num_rows, height * num_columns * width, device=out.device):
            across = right.index_select(0, column[strip].reshape(-1)).view(-1, per_block, width)
            down = left.index_select(0, row[strip].reshape(-1)).mul_(
                values.view(num_rows, -1)[strip].reshape(-1, 1)
            )
            chunks = torch.bmm(down.view(-1, per_block, height).mT, across)
            out[strip] = chunks.view(-1, num_columns, height, width).transpose(1, 2)
        return out.view(shape)

    @staticmethod
    def _bases(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        return cosine_basis(height, like.dtype, like.device), cosine_basis(width, like.dtype, like.device)
