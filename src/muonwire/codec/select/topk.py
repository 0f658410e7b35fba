"""Selection by magnitude."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.finite import check_finite
from muonwire.codec.host import flagged, on_host
from muonwire.codec.memory import STRIP_NUMEL, strips
from muonwire.codec.select.amount import Entries
from muonwire.codec.select.base import Groups

LARGEST_BITS = (1 << 31) - 1
# For fewer chosen entries the calls weigh more than the passes that are saved.
SMALLEST_BY_COLUMNS = 1 << 9


@dataclass(frozen=True, kw_only=True)
class TopK(Entries):
    """The entries of largest magnitude: ``k`` of each block, or a ``density`` of the whole tensor (at least one).

    Args:
        k: entries a block (a chunk of the transform, or a row). A block with fewer sends them all.
        density: share of the tensor's entries, in (0, 1]. Exactly one of the two is given.
    """

    name: ClassVar[str] = "topk"
    k: int | None = None
    density: float | None = None

    @override
    def choose(self, blocks: Tensor) -> Tensor:
        """Of equal magnitudes at the edge the first are taken."""
        groups = self.groups(*blocks.shape)
        if groups.count == 0:
            return torch.zeros(0, dtype=torch.int64, device=blocks.device)
        if not on_host(blocks.device):
            return _on_device(blocks.reshape(groups.num_groups, groups.group_numel), groups.k)
        rows = blocks.reshape(groups.num_groups, groups.group_numel).numpy()
        columns = _num_columns(groups) if blocks.dtype == torch.float32 else 0
        items = _by_columns(rows, groups.k, columns) if columns else _by_partition(rows, groups.k)
        return torch.from_numpy(np.concatenate(items))


def _on_device(rows: Tensor, k: int) -> Tensor:
    """The ``k`` largest of each row by the device's own search for the k-th; of those equal to it the first."""
    magnitudes = rows.abs()
    edges = magnitudes.topk(k, dim=1, sorted=True).values[:, -1:]
    above, ties = magnitudes > edges, magnitudes == edges
    room = k - above.sum(1, keepdim=True)
    chosen = above | (ties & (ties.cumsum(1) <= room))
    return flagged(chosen.view(-1), len(rows) * k)


@lru_cache(maxsize=1024)
def _num_columns(groups: Groups) -> int:
    """Columns to cut a group into: a divisor of its items, at least twice k and at most an eighth of them; 0 if there is none."""
    low, high = 2 * groups.k, groups.group_numel // 8
    if groups.count < SMALLEST_BY_COLUMNS or groups.group_numel > STRIP_NUMEL:
        return 0
    return next((c for c in range(low, min(2 * low, high) + 1) if groups.group_numel % c == 0), 0)


def _by_columns(rows: Any, k: int, num_columns: int) -> list[Any]:
    """The ``k`` largest of each row, through the few that reach the k-th largest maximum of the row's columns.

    With the row seen as a matrix of that many columns, k columns have a maximum of at least the edge, so at least k entries do.
    """
    num_rows, numel = rows.shape
    found, values = [], []
    magnitudes = reach = None
    for strip in strips(num_rows, numel):
        part = rows[strip]
        # Fresh pages would cost more than what is written to them.
        if magnitudes is None or len(part) != len(magnitudes):
            magnitudes, reach = np.empty_like(part), np.empty(part.shape, dtype=bool)
        np.abs(part, out=magnitudes)
        peaks = torch.from_numpy(magnitudes).view(len(magnitudes), -1, num_columns).amax(dim=1).numpy()
        peaks.partition(num_columns - k, axis=1)
        near = np.flatnonzero(np.greater_equal(magnitudes, peaks[:, num_columns - k, None], out=reach))
        values.append(magnitudes.reshape(-1)[near])
        found.append(near + strip.start * numel)
    candidates = np.concatenate(found)
    bits = np.concatenate(values).view(np.int32).astype(np.int64)
    row = candidates // numel
    first = np.searchsorted(row, np.arange(num_rows + 1))
    if np.diff(first).min() < k:
        # Only a NaN, which compares with nothing, leaves a row with fewer.
        check_finite(torch.from_numpy(rows))
    # One sort by row and descending magnitude gives each row's edge.
    order = np.sort((row << 32) + (LARGEST_BITS - bits))
    edges = LARGEST_BITS - (order[first[:-1] + k - 1] & 0xFFFFFFFF)
    chosen = candidates[bits >= edges[row]]
    if len(chosen) == num_rows * k:
        return [chosen]
    return _at_least(rows, edges.astype(np.int32)[:, None], k, start=0)


def _by_partition(rows: Any, k: int) -> list[Any]:
    """The ``k`` largest of each row by partitioning a copy of its magnitudes."""
    num_rows, numel = rows.shape
    items = []
    for strip in strips(num_rows, numel):
        bits = _magnitude_bits(rows[strip])
        bits.partition(numel - k, axis=1)
        edges = bits[:, numel - k, None].copy()
        items += _at_least(rows[strip], edges, k, start=strip.start * numel)
    return items


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
