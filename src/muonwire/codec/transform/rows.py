"""No transform: blocks are rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.base import Transform, matrix_shape


@dataclass(frozen=True, kw_only=True)
class Rows(Transform):
    """No transform: the blocks are the rows of the matrix (dimension 0 by all others); a vector is one row."""

    name: ClassVar[str] = "rows"

    @override
    def grid(self, shape: Shape) -> tuple[int, int]:
        return matrix_shape(shape)

    @override
    def largest_gain(self, shape: Shape) -> float:
        """Entries are coefficients."""
        return 1.0

    @override
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        return tensor.reshape(self.grid(tuple(tensor.shape)))

    @override
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        return blocks.reshape(shape)
