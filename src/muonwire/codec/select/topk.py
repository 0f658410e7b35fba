"""Selection by magnitude."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from muonwire.codec.select.base import Groups, Select
from muonwire.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class TopK(Select):
    """The entries of largest magnitude: ``k`` of each block, or a ``density`` of the whole tensor (at least one).

    Args:
        k: entries a block (a chunk of the transform, or a row). A block with fewer sends them all.
        density: share of the tensor's entries, in (0, 1]. Exactly one of the two is given.
    """

    name: ClassVar[str] = "topk"
    k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.density is None):
            raise UsageError(f"topk: k is {self.k} and density is {self.density}; give exactly one of them")
        if self.k is not None and self.k < 1:
            raise UsageError(f"topk: k is {self.k}; it must be at least 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"topk: density is {self.density}; it must lie in (0, 1]")

    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """See Select.groups."""
        if self.k is not None:
            return Groups(num_groups=num_blocks, group_numel=block_numel, k=min(self.k, block_numel))
        assert self.density is not None
        numel = num_blocks * block_numel
        return Groups(num_groups=1, group_numel=numel, k=min(numel, max(1, round(self.density * numel))))

    def choose(self, blocks: Tensor) -> Tensor:
        """See Select.choose."""
        num_blocks, block_numel = blocks.shape
        groups = self.groups(num_blocks, block_numel)
        magnitude = blocks.abs()
        if self.k is None:
            return magnitude.view(-1).topk(groups.k, sorted=False).indices.sort().values
        inside = magnitude.topk(groups.k, dim=1, sorted=False).indices.sort(dim=1).values
        starts = torch.arange(num_blocks, device=blocks.device).unsqueeze(1) * block_numel
        return (inside + starts).view(-1)
