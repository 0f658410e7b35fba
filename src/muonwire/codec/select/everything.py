"""No selection."""

from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from muonwire.codec.select.base import Groups, Select


@dataclass(frozen=True, kw_only=True)
class All(Select):
    """Every entry."""

    name: ClassVar[str] = "all"

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        return Groups(num_groups=1, group_numel=num_blocks * block_numel, k=num_blocks * block_numel)
