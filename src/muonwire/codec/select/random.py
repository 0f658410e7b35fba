"""Selection at random, which costs no indices."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from muonwire.codec import random
from muonwire.codec.select.amount import Entries
from muonwire.codec.select.base import Groups


# One mean draws the same items for every replica's body.
@lru_cache(maxsize=2)
def _draw(groups: Groups, seed: int) -> Tensor:
    return random.subsets(seed, "randomk", groups.num_groups, groups.group_numel, groups.k)


@dataclass(frozen=True, kw_only=True)
class RandomK(Entries):
    """Entries drawn uniformly from the round's seed, the same on all replicas: exactly ``k`` of each block, or a ``density``
    of the whole tensor (at least one).

    No index goes on the wire. The values are sent as they are: the unbiased estimate, which multiplies them by n / k, belongs to
    the stage, since a feedback must subtract the unscaled values.

    Args:
        k: entries a block (a chunk of the transform, or a row). A block with fewer sends them all.
        density: share of the tensor's entries, in (0, 1]. Exactly one of the two is given.

    Source: Stich et al., "Sparsified SGD with memory", arXiv 1809.07599, section 2; Wangni et al., arXiv 1710.09854.

    >>> RandomK(k=2).draw(2, 5, seed=1)
    tensor([0, 2, 7, 9])
    """

    name: ClassVar[str] = "randomk"
    shared: ClassVar[bool] = True
    seeded: ClassVar[bool] = True
    k: int | None = None
    density: float | None = None

    @override
    def draw(self, num_blocks: int, block_numel: int, *, seed: int) -> Tensor:
        return _draw(self.groups(num_blocks, block_numel), seed)
