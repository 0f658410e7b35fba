"""How a parameter is seen as matrices: what the polar and scale stages work on."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from muonwire.errors import UsageError

_PARTS = re.compile(r"(?P<count>\d+) interleaved( by (?P<run>\d+))?|(?P<sizes>\d+(\+\d+)*)")
_FORM = re.compile(r"(?P<kind>matrix|conv|batch)(?P<transposed>\.T)?(/(?P<parts>.+))?")


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """A parameter as one matrix or many, each (m, n) with m outputs and n inputs, as ``nn.Linear`` stores them.

    Args:
        kind: "matrix": (m, n) as it is; "conv": (out, in, *kernel) as (out, in · kernel); "batch": (..., m, n) as a batch,
            such as the stacked experts of a mixture.
        transposed: whether it is stored with its inputs first: (n, m), (in, out, *kernel) or (..., n, m). Default: False.
        parts: along dimension m, each a matrix of its own: their number where they are equal, such as 3 for a fused
            query-key-value weight, or their sizes, such as (64, 16, 16) for grouped-query attention. Default: 1.
        interleaved: 0 where the parts lie one behind another. Else equal parts take turns, and this is how many rows a part
            gets at a time: 1 where rows 0, 2, 4, … are one part and 1, 3, 5, … the other. Default: 0.

    Raises:
        UsageError: an unknown kind, parts that are not positive, or unequal parts that are interleaved.

    >>> layout = MatrixLayout.parse("batch.T/2 interleaved")
    >>> layout.shapes((8, 4, 6))
    [(8, 2, 3, 4)]
    >>> MatrixLayout(parts=(64, 16, 16)).shapes((96, 32)), str(MatrixLayout(parts=(64, 16, 16)))
    ([(64, 32), (16, 32), (16, 32)], 'matrix/64+16+16')
    """

    kind: str = "matrix"
    transposed: bool = False
    parts: int | tuple[int, ...] = 1
    interleaved: int = 0

    def __post_init__(self) -> None:
        sizes = self.parts if isinstance(self.parts, tuple) else (self.parts,)
        if self.kind not in ("matrix", "conv", "batch") or not sizes or min(sizes) < 1:
            raise UsageError(
                f"layout: {self.kind!r} in {self.parts} parts; kinds are matrix, conv and batch, parts >= 1"
            )
        if self.interleaved < 0 or (self.interleaved and isinstance(self.parts, tuple)):
            raise UsageError(
                f"layout: parts {self.parts} interleaved by {self.interleaved}; only equal parts interleave, by at least 1 row"
            )

    @classmethod
    @cache
    def parse(cls, text: str) -> "MatrixLayout":
        """Read "matrix", "conv" or "batch"; with ".T" behind it where inputs come first; then "/parts" where it is split.

        Raises:
            UsageError: the text has another form.
        """
        match = _FORM.fullmatch(text)
        if match is None:
            raise UsageError(
                f"layout: {text!r} does not parse; write matrix, conv or batch, matrix.T where inputs come first, or matrix/3 for "
                "three parts"
            )
        parts, interleaved = parse_parts(match["parts"] or "1")
        return cls(
            kind=match["kind"], transposed=bool(match["transposed"]), parts=parts, interleaved=interleaved
        )

    def __str__(self) -> str:
        parts = "+".join(map(str, self.parts)) if isinstance(self.parts, tuple) else str(self.parts)
        if self.interleaved:
            parts += " interleaved" + (f" by {self.interleaved}" if self.interleaved > 1 else "")
        form = self.kind + ".T" * self.transposed
        return form if parts == "1" else f"{form}/{parts}"

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """(..., m, n) of the tensors that ``split`` gives for a parameter of ``shape``.

        Raises:
            UsageError: the shape has too few dimensions, or does not split that way.
        """
        lead, rows, columns = self._whole(tuple(shape))
        if isinstance(self.parts, tuple):
            if sum(self.parts) != rows:
                raise UsageError(
                    f"layout {self}: {rows} rows of shape {shape} do not split into parts of {self.parts}, which have "
                    f"{sum(self.parts)}"
                )
            return [(*lead, size, columns) for size in self.parts]
        if rows % (self.parts * max(self.interleaved, 1)):
            runs = f", {self.interleaved} rows at a time" if self.interleaved > 1 else ""
            raise UsageError(
                f"layout {self}: {rows} rows of shape {shape} do not split into {self.parts} equal parts{runs}"
            )
        batch = (self.parts,) if self.parts > 1 else ()
        return [(*lead, *batch, rows // self.parts, columns)]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """``tensor`` as its matrices: one (..., m, n) of all equal parts, or one of each part where they are unequal.

        Views where memory allows, which is always but for transposed convolutions and for parts that interleave by runs.

        Raises:
            UsageError: see ``shapes``.
        """
        shapes = self.shapes(tuple(tensor.shape))
        if self.transposed:
            tensor = tensor.transpose(0, 1) if self.kind == "conv" else tensor.mT
        if isinstance(self.parts, tuple):
            lead, rows, columns = self._whole(tuple(tensor.shape), transposed=False)
            return list(torch.split(tensor.reshape(*lead, rows, columns), list(self.parts), dim=-2))
        if self.interleaved and self.parts > 1:
            lead, _, columns = self._whole(tuple(tensor.shape), transposed=False)
            tensor = tensor.reshape(*lead, -1, self.parts, self.interleaved, columns).movedim(-3, -4)
        return [tensor.reshape(shapes[0])]

    def join(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``split``: the parameter's ``shape`` out of its matrices."""
        shape = tuple(shape)
        if isinstance(self.parts, tuple):
            whole = torch.cat(list(parts), dim=-2)
        else:
            (whole,) = parts
            if self.interleaved and self.parts > 1:
                runs = whole.reshape(*whole.shape[:-2], -1, self.interleaved, whole.shape[-1])
                whole = runs.movedim(-4, -3)
        if not self.transposed:
            return whole.reshape(shape)
        if self.kind == "conv":
            return whole.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()
        return whole.reshape(*shape[:-2], shape[-1], shape[-2]).mT.contiguous()

    def _whole(
        self, shape: tuple[int, ...], *, transposed: bool | None = None
    ) -> tuple[tuple[int, ...], int, int]:
        """Leading dimensions, rows and columns, before the parts."""
        if len(shape) < 2:
            raise UsageError(
                f"layout {self}: a parameter of shape {shape} is no matrix; give it to Adam instead"
            )
        if self.kind == "matrix" and len(shape) != 2:
            raise UsageError(
                f"layout {self}: shape {shape} has {len(shape)} dimensions; name it conv or batch"
            )
        turned = self.transposed if transposed is None else transposed
        if self.kind == "conv":
            rows, inputs = (shape[1], shape[0]) if turned else shape[:2]
            return (), rows, inputs * math.prod(shape[2:])
        rows, columns = (shape[-1], shape[-2]) if turned else shape[-2:]
        return shape[:-2], rows, columns


def parse_parts(parts: int | Sequence[int] | str) -> tuple[int | tuple[int, ...], int]:
    """``parts`` and ``interleaved`` of a layout: 3, (64, 16, 16) or, as text, "3", "64+16+16", "2 interleaved" (by rows) or
    "3 interleaved by 64" (64 rows at a time, such as a head's).

    Raises:
        UsageError: it has another form.

    >>> parse_parts((64, 16, 16)), parse_parts("64+16+16"), parse_parts("2 interleaved")
    (((64, 16, 16), 0), ((64, 16, 16), 0), (2, 1))
    """
    if isinstance(parts, int):
        return int(parts), 0
    if isinstance(parts, str):
        match = _PARTS.fullmatch(parts)
        if match is not None and match["count"]:
            return int(match["count"]), int(match["run"] or 1)
        if match is not None:
            sizes = tuple(map(int, match["sizes"].split("+")))
            return (sizes, 0) if len(sizes) > 1 else (sizes[0], 0)
    elif parts and all(type(size) is int for size in parts):
        return tuple(parts), 0
    raise UsageError(
        f"layout: parts are {parts!r}; write their number, such as 3, their sizes, such as (64, 16, 16), or '2 interleaved' or "
        "'3 interleaved by 64'"
    )
