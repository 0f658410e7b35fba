"""Selections: which coefficients go on the wire."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from muonwire.codec.part import Part
from muonwire.errors import UsageError


class Select(Part):
    """Blocks to the sorted flat positions of the entries that are sent."""

    @abstractmethod
    def count(self, num_blocks: int, block_numel: int) -> int:
        """How many entries are selected."""

    @abstractmethod
    def positions(self, blocks: Tensor) -> Tensor | None:
        """Sorted flat positions (int64) of the selected entries of (num_blocks, block_numel); None: all of them."""


@dataclass(frozen=True, kw_only=True)
class All(Select):
    """Every entry."""

    name: ClassVar[str] = "all"

    def count(self, num_blocks: int, block_numel: int) -> int:
        """See Select.count."""
        return num_blocks * block_numel

    def positions(self, blocks: Tensor) -> Tensor | None:
        """See Select.positions."""
        return None


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

    def count(self, num_blocks: int, block_numel: int) -> int:
        """See Select.count."""
        numel = num_blocks * block_numel
        if self.k is not None:
            return num_blocks * min(self.k, block_numel)
        assert self.density is not None
        return min(numel, max(1, round(self.density * numel)))

    def positions(self, blocks: Tensor) -> Tensor | None:
        """See Select.positions."""
        num_blocks, block_numel = blocks.shape
        count = self.count(num_blocks, block_numel)
        if count == blocks.numel():
            return None
        magnitude = blocks.abs()
        if self.k is None:
            return magnitude.view(-1).topk(count, sorted=False).indices.sort().values
        inside = magnitude.topk(min(self.k, block_numel), dim=1, sorted=False).indices.sort(dim=1).values
        starts = torch.arange(num_blocks, device=blocks.device).unsqueeze(1) * block_numel
        return (inside + starts).view(-1)
