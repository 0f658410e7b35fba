"""No transform: blocks are rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.base import Transform, matrix_shape


@dataclass(frozen=True, kw_only=True)
class Rows(Transform):
    """No transform: the blocks are the rows of the matrix (dimension 0 by all others); a vector is one row."""

    name: ClassVar[str] = "rows"

    def grid(self, shape: Shape) -> tuple[int, int]:
        """See Transform.grid."""
        return matrix_shape(shape)

    def largest_gain(self, shape: Shape) -> float:
        """See Transform.largest_gain: an entry is a coefficient."""
        return 1.0

    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        """See Transform.forward."""
        return tensor.reshape(self.grid(tuple(tensor.shape)))

    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        """See Transform.inverse."""
        return blocks.reshape(shape)
