"""Selection by magnitude."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from muonwire.codec.memory import strips
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
        rows = blocks.reshape(groups.num_groups, groups.group_numel).numpy()
        items = []
        for strip in strips(*rows.shape):
            bits = _magnitude_bits(rows[strip])
            bits.partition(groups.group_numel - groups.k, axis=1)
            edges = bits[:, groups.group_numel - groups.k, None].copy()
            items += _at_least(rows[strip], edges, groups.k, start=strip.start * groups.group_numel)
        return torch.from_numpy(np.concatenate(items))


def _magnitude_bits(values: Any) -> Any:
    """The bits of the magnitudes as integers, which are ordered as the magnitudes are."""
    return np.abs(values).view(f"i{values.itemsize}")


def _at_least(rows: Any, edges: Any, k: int, *, start: int) -> list[Any]:
    """The ``k`` items of each row whose magnitude is at least the row's edge; of those at the edge the first."""
    num_rows, numel = rows.shape
    found = []
    # A strip holds many rows or is a part of one; either way its values follow one another in memory.
    for columns in strips(numel, num_rows):
        bits = _magnitude_bits(rows[:, columns])
        found.append(np.flatnonzero(bits >= edges) + (start + columns.start))
    if sum(map(len, found)) == num_rows * k:
        return found
    bits = _magnitude_bits(rows)
    above, ties = bits > edges, bits == edges
    room = k - np.count_nonzero(above, axis=1, keepdims=True)
    return [np.flatnonzero(above | (ties & (np.cumsum(ties, axis=1, dtype=np.int32) <= room))) + start]
