"""The contract of a transform: from a tensor to blocks of coefficients, and back.

Every later part sees a matrix (num_blocks, block_numel): a row of the tensor, or a chunk of its cosine transform.
"""

import math
from abc import abstractmethod
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from muonwire.codec.host import on_host
from muonwire.codec.memory import uninitialized
from muonwire.codec.part import Part, Round, Shape, State


def matrix_shape(shape: Shape) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix: dimension 0 by all others; vectors and scalars are one row."""
    numel = math.prod(shape)
    if len(shape) < 2 or numel == 0:
        return (1, numel)
    return (shape[0], numel // shape[0])


@lru_cache(maxsize=1024)
def largest_divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``.

    >>> largest_divisor(384, 64), largest_divisor(101, 64)
    (64, 1)
    """
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


class Transform(Part):
    """Tensor to blocks and back."""

    # Whether the inverse of a mean is the mean of the inverses, up to rounding.
    linear: ClassVar[bool] = True
    # Whether the inverse has no product of matrices, whose rounding is the machine's.
    exact: ClassVar[bool] = True

    def init(self, shape: Shape) -> State:
        """What the sender keeps from round to round for a tensor of ``shape``; nothing by default."""
        return {}

    @abstractmethod
    def grid(self, shape: Shape) -> tuple[int, int]:
        """(num_blocks, block_numel) of a tensor of ``shape``."""

    def largest_gain(self, shape: Shape) -> float:
        """How many times the largest coefficient's magnitude an entry, or a number on the way to it, can be; inf: unknown."""
        return math.inf

    @abstractmethod
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        """(num_blocks, block_numel) coefficients of ``tensor``; may update ``now.state``."""

    @abstractmethod
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        """The tensor of ``shape`` whose coefficients are ``blocks``; ``seed`` is that of the round, 0 if not seeded."""

    def inverse_chosen(
        self, values: Tensor, positions: Tensor, shape: Shape, *, per_block: int | None, seed: int
    ) -> Tensor:
        """``inverse`` of blocks that are zero but for ``values`` at ``positions``, sorted and distinct.

        Args:
            values, positions: 1-D, of equal length.
            shape: the tensor's.
            per_block: how many of the values each block has, where it is the same number; else None.
            seed: see ``inverse``.
        """
        blocks = uninitialized(*self.grid(shape), dtype=values.dtype, device=values.device).zero_()
        if on_host(values.device):
            # Numpy scatters several times faster than torch.
            blocks.view(-1).numpy()[positions.numpy()] = values.numpy()
        else:
            blocks.view(-1).index_copy_(0, positions, values)
        return self.inverse(blocks, shape, seed=seed)
