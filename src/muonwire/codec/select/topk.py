"""Selection by magnitude."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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
        """See Select.choose; of equal magnitudes at the edge the first are taken."""
        groups = self.groups(*blocks.shape)
        if groups.count == 0:
            return torch.zeros(0, dtype=torch.int64)
        # The bits of a magnitude are ordered as the magnitudes are.
        magnitude = np.abs(blocks.reshape(groups.num_groups, groups.group_numel).numpy())
        bits = magnitude.view(f"i{magnitude.itemsize}")
        edge = np.partition(bits, groups.group_numel - groups.k, axis=1)[:, groups.group_numel - groups.k, None]
        chosen = bits >= edge
        if np.count_nonzero(chosen) > groups.count:
            above, ties = bits > edge, bits == edge
            room = groups.k - np.count_nonzero(above, axis=1, keepdims=True)
            chosen = above | (ties & (np.cumsum(ties, axis=1, dtype=np.int32) <= room))
        return torch.from_numpy(np.flatnonzero(chosen))
