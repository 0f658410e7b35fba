"""The contract of a selection: which coefficients go on the wire."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from muonwire.codec.part import Part


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What a packer writes of a selection: in each of ``num_groups`` groups of ``group_numel`` items, which ``k`` are chosen.

    The information in it is num_groups · log2 C(group_numel, k) bits where all choices are equally likely.
    """

    num_groups: int
    group_numel: int
    k: int

    @property
    def numel(self) -> int:
        """Items in all groups."""
        return self.num_groups * self.group_numel

    @property
    def count(self) -> int:
        """Chosen items in all groups."""
        return self.num_groups * self.k


class Select(Part):
    """Blocks to the items that are chosen, and from those to the entries that are sent.

    An item is what one index on the wire stands for: an entry, a row, a column, a tile. Items are numbered through all groups.
    """

    # Whether the choice follows from the grid and the round's seed alone, so that no index goes on the wire.
    shared: ClassVar[bool] = False

    @abstractmethod
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """How items of a grid are grouped, and how many of each group are chosen."""

    def choose(self, blocks: Tensor) -> Tensor:
        """Sorted items (int64) for the coefficients (num_blocks, block_numel), on their device."""
        raise AssertionError(f"{self.name} is shared")

    def draw(self, num_blocks: int, block_numel: int, *, seed: int) -> Tensor:
        """Sorted items (int64) of a shared selection, on the CPU."""
        raise AssertionError(f"{self.name} is not shared")

    def count(self, num_blocks: int, block_numel: int) -> int:
        """How many entries are sent: as many as items are chosen, unless an item is more than an entry."""
        return self.groups(num_blocks, block_numel).count

    def expand(self, items: Tensor, num_blocks: int, block_numel: int) -> Tensor:
        """Sorted flat positions (int64) of the entries of the chosen items."""
        return items
