"""Selection of whole columns by norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.select.amount import amount, check_amount
from muonwire.codec.select.base import Groups, Select
from muonwire.codec.select.norms import largest, squared_norms


@dataclass(frozen=True, kw_only=True)
class TopColumns(Select):
    """The columns of largest Euclidean norm, whole; of equal ones the first.

    After a transform a column is one coefficient of every block. Columns of a vector are its entries.

    Args:
        k: columns.
        density: share of the columns, in (0, 1]; at least one. Exactly one of the two is given.

    >>> TopColumns(k=1).choose(torch.tensor([[2.0, 3.0], [2.5, 0.0]]))
    tensor([0])
    """

    name: ClassVar[str] = "topcolumns"
    k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        check_amount(self.name, k=self.k, density=self.density)

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """One group, whose items are columns."""
        return Groups(
            num_groups=1, group_numel=block_numel, k=amount(block_numel, k=self.k, density=self.density)
        )

    @override
    def choose(self, blocks: Tensor) -> Tensor:
        return largest(squared_norms(blocks, dim=0), self.groups(*blocks.shape).k)

    @override
    def count(self, num_blocks: int, block_numel: int) -> int:
        return self.groups(num_blocks, block_numel).k * num_blocks

    @override
    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        return (torch.arange(num_blocks).unsqueeze(1) * block_numel + items).view(-1)
