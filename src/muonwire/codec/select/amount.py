"""How much a selection chooses: a number of items, or a share of them."""

from muonwire.codec.select.base import Groups, Select
from muonwire.errors import UsageError


class Amount(Select):
    """A selection of ``k`` items, or of the share ``density`` of them and at least one; exactly one of the two is given.

    Its subclasses declare both as fields, among their own options in the order of the textual form.
    """

    k: int | None
    density: float | None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.density is None):
            raise UsageError(
                f"{self.name}: k is {self.k} and density is {self.density}; give exactly one of them"
            )
        if self.k is not None:
            self.check_count("k")
        else:
            self.check_share("density")

    def of(self, num_groups: int, group_numel: int) -> Groups:
        """Groups with as many chosen items in each as the options say, but never more than there are."""
        k = self.k
        if k is None:
            assert self.density is not None
            k = max(1, round(self.density * group_numel))
        return Groups(num_groups=num_groups, group_numel=group_numel, k=min(group_numel, k))


class Entries(Amount):
    """A selection of entries: ``k`` of each block, or a ``density`` of the whole tensor."""

    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        """A group for each block with ``k``, one group with ``density``."""
        by_block = self.k is not None
        return self.of(num_blocks, block_numel) if by_block else self.of(1, num_blocks * block_numel)
