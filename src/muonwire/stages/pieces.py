"""How the tensors of a group are cut into a part for each owner."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from muonwire.codec.base import Encoded
from muonwire.codec.host import CPU
from muonwire.codec.part import Shape

# From the finest to the coarsest; see Codec.unit.
UNITS = ("entry", "row", "tensor")


class Piece(NamedTuple):
    """Entries of one tensor that lie one behind the other, and have one owner.

    Args:
        tensor: its number in the group.
        begin, end: of the entries in the flat tensor.
        shape: of the piece.
    """

    tensor: int
    begin: int
    end: int
    shape: Shape

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of ``tensor``, a view where memory allows."""
        return tensor.reshape(-1)[self.begin : self.end].view(self.shape)


@lru_cache(maxsize=256)
def cut(shapes: tuple[Shape, ...], owners: int, unit: str) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of each owner: all tensors one behind the other, cut into parts as equal as the unit allows.

    A unit belongs to the owner of its middle: with N entries in all, to owner ⌊middle · owners / N⌋. Tensors without entries have
    no pieces.

    >>> [[p[:3] for p in pieces] for pieces in cut(((2, 3), (4,)), 2, "row")]
    [[(0, 0, 6)], [(1, 0, 4)]]
    >>> [[p[:3] for p in pieces] for pieces in cut(((2, 3), (4,)), 2, "entry")]
    [[(0, 0, 5)], [(0, 5, 6), (1, 0, 4)]]
    """
    total = sum(math.prod(shape) for shape in shapes)
    parts: list[list[Piece]] = [[] for _ in range(owners)]
    before = 0
    for i, shape in enumerate(shapes):
        numel = math.prod(shape)
        if not numel:
            continue
        rest = shape[1:] if unit == "row" else ()
        width = numel if unit == "tensor" else math.prod(rest)
        units = numel // width
        # The first unit u whose middle, before + (u + ½) width, reaches part j.
        edges = [
            min(
                max(-((2 * before * owners + width * owners - 2 * total * j) // (2 * width * owners)), 0),
                units,
            )
            for j in range(owners)
        ]
        for j, (begin, end) in enumerate(zip(edges, [*edges[1:], units], strict=True)):
            if end > begin:
                piece_shape = shape if unit == "tensor" else (end - begin, *rest)
                parts[j].append(Piece(i, begin * width, end * width, piece_shape))
        before += numel
    return tuple(map(tuple, parts))


def assemble(
    pieces: Sequence[tuple[Piece, Tensor]], shape: Shape, *, dtype: torch.dtype, device: torch.device = CPU
) -> Tensor:
    """A tensor out of all its pieces, in any order, on their device."""
    whole = torch.empty(math.prod(shape), dtype=dtype, device=device)
    for piece, values in pieces:
        whole[piece.begin : piece.end] = values.reshape(-1)
    return whole.view(shape)


def assembled(encoded: Sequence[tuple[Piece, Encoded]], signal: Tensor) -> Encoded:
    """The encoding of a whole tensor, ``signal``, of which each piece was encoded by itself; it has no body."""

    def joined(parts: Sequence[tuple[Piece, Tensor]]) -> Tensor:
        dtype = parts[0][1].dtype if parts else signal.dtype
        return assemble(parts, tuple(signal.shape), dtype=dtype, device=signal.device)

    return Encoded(
        fields=(),
        restore_decoded=lambda: joined([(piece, e.decoded) for piece, e in encoded]),
        restore_selected=lambda: joined([(piece, e.selected) for piece, e in encoded]),
    )
