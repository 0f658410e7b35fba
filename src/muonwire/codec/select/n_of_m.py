"""N of each M consecutive entries."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import flagged
from muonwire.codec.select.base import Groups, Select
from muonwire.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class NOfM(Select):
    """The ``n`` entries of largest magnitude of each ``m`` consecutive ones of the flat tensor; of equal ones the first.

    A group's choice holds log2 C(m, n) bits of information (2.6 for 2 of 4), and no search goes over
    the whole tensor. The last entries, fewer than ``m``, which do not fill a group, are all sent.

    Args:
        n: how many of a group, 1 … m. Default: 2.
        m: entries of a group. Default: 4.

    Source: the 2:4 sparsity of Mishra et al., "Accelerating sparse deep neural networks", arXiv 2104.08378, here for
    what is sent.

    >>> NOfM(n=1, m=3).choose(torch.tensor([[1.0, -4.0, 2.0, 5.0, 5.0, 0.0, 7.0]]))
    tensor([1, 3])
    """

    name: ClassVar[str] = "nm"
    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        self.check_count("m")
        if not isinstance(self.n, int) or not 1 <= self.n <= self.m:
            raise UsageError(f"nm: n is {self.n}; with m={self.m} it must be an integer in 1 ... {self.m}")

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        return Groups(num_groups=num_blocks * block_numel // self.m, group_numel=self.m, k=self.n)

    @override
    def choose(self, blocks: Tensor) -> Tensor:
        groups = self.groups(*blocks.shape)
        magnitude = blocks.reshape(-1)[: groups.numel].abs().view(groups.num_groups, self.m)
        chosen = torch.zeros_like(magnitude, dtype=torch.bool)
        # n times the largest of what is left: several times faster than sorting millions of short rows.
        for _ in range(self.n):
            first = magnitude.argmax(dim=1, keepdim=True)
            chosen.scatter_(1, first, True)
            magnitude.scatter_(1, first, -1)
        return flagged(chosen.view(-1), groups.count)

    @override
    def count(self, num_blocks: int, block_numel: int) -> int:
        groups = self.groups(num_blocks, block_numel)
        return groups.count + num_blocks * block_numel - groups.numel

    @override
    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        begin = self.groups(num_blocks, block_numel).numel
        rest = torch.arange(begin, num_blocks * block_numel, device=items.device)
        return torch.cat((items, rest))
