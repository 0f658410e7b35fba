"""Chunks of the matrix as they are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.chunks import Chunked


@dataclass(frozen=True, kw_only=True)
class Tiles(Chunked):
    """The chunks of ``Dct`` without its change of basis: a block is a tile of the matrix, row by row.

    Nothing is computed, so that it is the same to the last bit on every machine.

    Args:
        chunk: largest tile a dimension. Default: 64.

    Source: Sarfi et al., "SparseLoCo", arXiv 2508.15706: a selection of each chunk of 64 × 64 entries.

    >>> import torch
    >>> Tiles(chunk=2).forward(torch.arange(8.0).view(2, 4), Round())
    tensor([[0., 1., 4., 5.],
            [2., 3., 6., 7.]])
    """

    name: ClassVar[str] = "tiles"

    @override
    def largest_gain(self, shape: Shape) -> float:
        """Entries are coefficients."""
        return 1.0

    @override
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        shape = tuple(tensor.shape)
        tiles: Tensor = tensor.reshape(self._chunks(shape)).transpose(1, 2)
        return tiles.reshape(self.grid(shape))

    @override
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        num_rows, height, num_columns, width = self._chunks(shape)
        return blocks.reshape(num_rows, num_columns, height, width).transpose(1, 2).reshape(shape)
