"""The contract of a packer: which items were chosen, to bytes and back."""

from abc import abstractmethod

import numpy as np

from muonwire.codec.pack.fields import Ints
from muonwire.codec.part import Part
from muonwire.codec.select.base import Groups
from muonwire.errors import PayloadError


class Pack(Part):
    """Sorted items (int64) to bytes and back. Integer and elementwise IEEE arithmetic alone, so that all machines agree."""

    @abstractmethod
    def encode(self, items: Ints, groups: Groups) -> bytes:
        """The bytes of ``groups.count`` sorted items, ``groups.k`` in each group."""

    @abstractmethod
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        """Read ``groups.count`` items off the front of ``data``; returns them and the number of bytes read.

        Raises:
            PayloadError: the bytes are cut off, or are not ``k`` sorted items inside each of the groups.
        """

    @abstractmethod
    def estimate_bytes(self, groups: Groups) -> int:
        """Expected bytes of ``encode`` for items chosen uniformly."""


def starts(groups: Groups) -> Ints:
    """The first item of each group, (num_groups, 1)."""
    return (np.arange(groups.num_groups, dtype=np.int64) * groups.group_numel)[:, None]


def gaps_of(items: Ints, groups: Groups) -> Ints:
    """How many items of its group lie between each chosen item and the chosen one before it (or the group's start)."""
    inside = items.reshape(groups.num_groups, groups.k) - starts(groups)
    return (np.diff(inside, axis=1, prepend=-1) - 1).reshape(-1)


def items_of(gaps: Ints, groups: Groups) -> Ints:
    """The inverse of gaps_of, for gaps (at least 0) from outside.

    Raises:
        PayloadError: an item lies behind its group's end.
    """
    inside = np.cumsum(gaps.reshape(groups.num_groups, groups.k) + 1, axis=1) - 1
    return checked((inside + starts(groups)).reshape(-1), groups)


def checked(items: Ints, groups: Groups) -> Ints:
    """Ascending ``items``, where each group holds its ``k`` of them.

    Raises:
        PayloadError: one lies in another group.
    """
    by_group = items.reshape(groups.num_groups, groups.k)
    first = starts(groups)
    if bool((by_group[:, :1] < first).any()) or bool((by_group[:, -1:] >= first + groups.group_numel).any()):
        raise PayloadError(
            f"payload: a position outside its group; {groups.k} are expected in each of {groups.num_groups} groups of "
            f"{groups.group_numel}"
        )
    return items
