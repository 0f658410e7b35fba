"""Entries of which replicas take turns, at no cost in indices."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.select.base import Groups, Select


@dataclass(frozen=True, kw_only=True)
class Turns(Select):
    """Every F-th entry of the flat tensor, from entry s mod F on, with s the body's seed: ⌈n / F⌉ of n.

    An exchange gives each replica the round's seed plus its rank. So of R replicas R / F send each entry in a round, and the
    exchange should divide by those that did (``over="senders"``); in the next round it is others. Of fewer than F replicas an
    exchange has each send one of R parts, so that somebody sends each entry. Where F does not divide n, the
    last number of a short part is the first of the entries that follow it around the end.

    Args:
        parts: F, at least 1. Default: 2.

    >>> Turns(parts=3).draw(1, 8, seed=4), Turns(parts=3).draw(1, 8, seed=5)
    (tensor([1, 4, 7]), tensor([0, 2, 5]))
    """

    name: ClassVar[str] = "turns"
    shared: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    parts: int = 2

    def __post_init__(self) -> None:
        self.check_count("parts")

    @override
    def groups(self, num_blocks: int, block_numel: int) -> Groups:
        numel = num_blocks * block_numel
        return Groups(num_groups=1, group_numel=numel, k=-(-numel // self.parts))

    @override
    def draw(self, num_blocks: int, block_numel: int, *, seed: int) -> Tensor:
        groups = self.groups(num_blocks, block_numel)
        if not groups.k:
            return torch.empty(0, dtype=torch.int64)
        first, numel = seed % self.parts, groups.group_numel
        items = torch.arange(groups.k) * self.parts + first
        # Only the last can lie beyond the end: then it comes before the first.
        return torch.cat([items[-1:] % numel, items[:-1]]) if items[-1] >= numel else items
