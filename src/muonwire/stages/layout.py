"""How a parameter is seen as matrices: what the polar and scale stages work on."""

import math
import re
from dataclasses import dataclass

from torch import Tensor

from muonwire.errors import UsageError

_FORM = re.compile(r"(?P<kind>matrix|conv|batch)(?:/(?P<parts>\d+))?")


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """A parameter as one or many matrices of equal shape.

    Args:
        kind: "matrix": (m, n) as it is; "conv": (out, in, *kernel) as (out, in · kernel); "batch": (..., m, n) as a batch,
            such as the stacked experts of a mixture.
        parts: equal parts along dimension m, each a matrix of its own, such as 3 for a fused query-key-value weight.

    >>> str(MatrixLayout.parse("matrix/3"))
    'matrix/3'
    """

    kind: str = "matrix"
    parts: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("matrix", "conv", "batch") or self.parts < 1:
            raise UsageError(
                f"layout: {self.kind!r} in {self.parts} parts; kinds are matrix, conv and batch, parts >= 1"
            )

    @classmethod
    def parse(cls, text: str) -> "MatrixLayout":
        """Read "matrix", "conv", "batch", each with "/parts" behind it where it is split."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise UsageError(
                f"layout: {text!r} does not parse; write matrix, conv or batch, or matrix/3 for three parts"
            )
        return cls(kind=match["kind"], parts=int(match["parts"] or 1))

    def __str__(self) -> str:
        return self.kind if self.parts == 1 else f"{self.kind}/{self.parts}"

    def matrices_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(..., m, n) in which ``shape`` is seen.

        Raises:
            UsageError: the shape has too few dimensions, or does not split evenly.
        """
        if len(shape) < 2:
            raise UsageError(
                f"layout {self}: a parameter of shape {shape} is no matrix; give it to Adam instead"
            )
        if self.kind == "matrix" and len(shape) != 2:
            raise UsageError(
                f"layout {self}: shape {shape} has {len(shape)} dimensions; name it conv or batch"
            )
        lead, rows, columns = shape[:-2], shape[-2], shape[-1]
        if self.kind == "conv":
            lead, rows, columns = (), shape[0], math.prod(shape[1:])
        if rows % self.parts:
            raise UsageError(
                f"layout {self}: {rows} rows of shape {shape} do not split into {self.parts} equal parts"
            )
        return (*lead, self.parts, rows // self.parts, columns) if self.parts > 1 else (*lead, rows, columns)

    def matrices(self, tensor: Tensor) -> Tensor:
        """``tensor`` as (..., m, n); a view where memory allows."""
        return tensor.reshape(self.matrices_shape(tuple(tensor.shape)))
