"""Selection of whole rows by norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.select.amount import amount, check_amount
from muonwire.codec.select.base import Groups, Select
from muonwire.codec.select.norms import largest, squared_norms


@dataclass(frozen=True, kw_only=True)
class TopRows(Select):
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
    k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        check_amount(self.name, k=self.k, density=self.density)

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """One group, whose items are rows."""
        return Groups(
            num_groups=1, group_numel=num_blocks, k=amount(num_blocks, k=self.k, density=self.density)
        )

    @override
    def choose(self, blocks: Tensor) -> Tensor:
        return largest(squared_norms(blocks, dim=1), self.groups(*blocks.shape).k)

    @override
    def count(self, num_blocks: int, block_numel: int) -> int:
        return self.groups(num_blocks, block_numel).k * block_numel

    @override
    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        return (items.unsqueeze(1) * block_numel + torch.arange(block_numel)).view(-1)
