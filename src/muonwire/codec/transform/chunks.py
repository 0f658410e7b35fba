"""Chunks: the blocks of transforms that cut the matrix in both dimensions."""

from dataclasses import dataclass

from typing_extensions import override

from muonwire.codec.part import Shape
from muonwire.codec.transform.base import Transform, largest_divisor, matrix_shape
from muonwire.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Chunked(Transform):
    """A transform whose block is a chunk of the matrix; a vector is chunked in its one dimension.

    The chunk's size in each dimension is the largest divisor of that dimension up to ``chunk``, so that nothing is padded.

    Args:
        chunk: largest chunk a dimension. Default: 64.
    """

    chunk: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.chunk, int) or self.chunk < 1:
            raise UsageError(f"{self.name}: chunk is {self.chunk}; it must be at least 1")

    def _chunks(self, shape: Shape) -> tuple[int, int, int, int]:
        """(chunks in a column of them, rows of a chunk, chunks in a row of them, columns of a chunk)."""
        rows, columns = matrix_shape(shape)
        height, width = (largest_divisor(max(size, 1), self.chunk) for size in (rows, columns))
        return rows // height, height, columns // width, width

    @override
    def grid(self, shape: Shape) -> tuple[int, int]:
        num_rows, height, num_columns, width = self._chunks(shape)
        return num_rows * num_columns, height * width
