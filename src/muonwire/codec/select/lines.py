"""Selection of whole rows or columns by norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.select.amount import Amount
from muonwire.codec.select.base import Groups
from muonwire.codec.select.norms import largest, squared_norms


@dataclass(frozen=True, kw_only=True)
class _TopLines(Amount):
    # The dimension that a row or column runs along is summed over; the other one counts them.
    along: ClassVar[int]
    k: int | None = None
    density: float | None = None

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """One group, whose items are rows or columns."""
        return self.of(1, (num_blocks, block_numel)[1 - self.along])

    @override
    def choose(self, blocks: Tensor) -> Tensor:
        return largest(squared_norms(blocks, dim=self.along), self.groups(*blocks.shape).k)

    @override
    def count(self, num_blocks: int, block_numel: int) -> int:
        return self.groups(num_blocks, block_numel).k * (num_blocks, block_numel)[self.along]


@dataclass(frozen=True, kw_only=True)
class TopRows(_TopLines):
    """The rows (blocks of a transform) of largest Euclidean norm, whole; of equal ones the first.

    One index stands for a row, so that indices cost next to nothing, and what is sent stays a dense matrix. A vector is one row,
    which is sent.

    Args:
        k: rows.
        density: share of the rows, in (0, 1]; at least one. Exactly one of the two is given.

    >>> TopRows(k=1).choose(torch.tensor([[2.0, 2.0], [3.0, 0.0]]))
    tensor([1])
    """

    name: ClassVar[str] = "toprows"
    along: ClassVar[int] = 1

    @override
    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        return (items.unsqueeze(1) * block_numel + torch.arange(block_numel, device=items.device)).view(-1)


@dataclass(frozen=True, kw_only=True)
class TopColumns(_TopLines):
    """The columns of largest Euclidean norm, whole; of equal ones the first.

    After a transform a column is one coefficient of every block. Columns of a vector are its entries.

    Args:
        k: columns.
        density: share of the columns, in (0, 1]; at least one. Exactly one of the two is given.

    >>> TopColumns(k=1).choose(torch.tensor([[2.0, 3.0], [2.5, 0.0]]))
    tensor([0])
    """

    name: ClassVar[str] = "topcolumns"
    along: ClassVar[int] = 0

    @override
    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        rows = torch.arange(num_blocks, device=items.device).unsqueeze(1)
        return (rows * block_numel + items).view(-1)
