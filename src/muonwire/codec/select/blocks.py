"""Selection of tiles by norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import flagged
from muonwire.codec.select.amount import Amount
from muonwire.codec.select.base import Groups
from muonwire.codec.select.norms import largest, squared_norms
from muonwire.codec.transform.base import largest_divisor


@dataclass(frozen=True, kw_only=True)
class TopBlocks(Amount):
    """The tiles of largest Euclidean norm, whole; of equal ones the first, row by row.

    Tiles cover the matrix (or a transform's blocks, each a row) without remainder: in each dimension their size is the largest
    divisor of that dimension up to ``size``. A vector's tiles are stretches of it; in a dimension that is a prime over
    ``size`` a tile is one entry long.

    Args:
        size: largest side of a tile, entries. Default: 16.
        k: tiles.
        density: share of the tiles, in (0, 1]; at least one. Exactly one of the two is given.

    >>> TopBlocks(size=2, k=1).choose(torch.tensor([[1.0, 1.0, 0.0, 1.6], [1.0, 1.0, 0.0, 0.0]]))
    tensor([0])
    """

    name: ClassVar[str] = "topblocks"
    size: int = 16
    k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("size")

    def _tile(self, num_blocks: int, block_numel: int) -> tuple[int, int]:
        """(height, width) of a tile; of an empty grid, whose tiles are empty, at least 1."""
        height, width = (largest_divisor(max(n, 1), self.size) for n in (num_blocks, block_numel))
        return height, width

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """One group, whose items are tiles."""
        height, width = self._tile(num_blocks, block_numel)
        return self.of(1, (num_blocks // height) * (block_numel // width))

    @override
    def choose(self, blocks: Tensor) -> Tensor:
        height, width = self._tile(*blocks.shape)
        tiles = blocks.reshape(blocks.shape[0] // height, height, blocks.shape[1] // width, width)
        return largest(squared_norms(tiles, dim=(1, 3)).view(-1), self.groups(*blocks.shape).k)

    @override
    def count(self, num_blocks: int, block_numel: int) -> int:
        height, width = self._tile(num_blocks, block_numel)
        return self.groups(num_blocks, block_numel).k * height * width

    @override
    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        height, width = self._tile(num_blocks, block_numel)
        tiles = (num_blocks // height, 1, block_numel // width, 1)
        chosen = torch.zeros(tiles, dtype=torch.bool, device=items.device)
        chosen.view(-1).index_fill_(0, items, True)
        count = len(items) * height * width
        return flagged(chosen.expand(-1, height, -1, width).reshape(-1), count)
