"""A randomized rotation: random signs, then a Walsh-Hadamard transform of each block."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import random
from muonwire.codec.host import on_host
from muonwire.codec.part import Round, Shape
from muonwire.codec.transform.base import Transform, largest_divisor

# Entries that are transformed at a time: they, and as many results, stay in the second-level cache.
_CACHED_NUMEL = 1 << 16


def block_grid(shape: Shape, block: int) -> tuple[int, int]:
    """(num_blocks, block_numel) of the flat tensor, with the largest divisor of its size up to ``block``.

    >>> block_grid((768, 3072), 1024), block_grid((13, 17), 1024), block_grid((1021, 1031), 1024)
    ((2304, 1024), (1, 221), (1031, 1021))
    """
    numel = math.prod(shape)
    if numel == 0:
        return (1, 0)
    block_numel = largest_divisor(numel, block)
    return numel // block_numel, block_numel


def _walsh_hadamard(x: Tensor) -> Tensor:
    """Orthonormal, symmetric and its own inverse: rows of x (count, 2^p) times H / 2^(p/2), in p levels of butterflies.

    Sums and differences are rounded one by one, alike on all machines; those of a matrix product are not.
    """
    size = x.shape[1]
    # Blocks are columns here, so that every operand is contiguous.
    source = (x * (1 / math.sqrt(size))).t().contiguous()
    target = torch.empty_like(source)
    half = 1
    while half < size:
        (a, b), (total, difference) = (t.view(size // (2 * half), 2, -1).unbind(1) for t in (source, target))
        torch.add(a, b, out=total)
        torch.sub(a, b, out=difference)
        source, target = target, source
        half *= 2
    return source.t()


def _rotate(blocks: Tensor, *, inverse: bool) -> Tensor:
    """Transform the first 2^p entries of each row, then the last 2^p, for the largest 2^p that fits."""
    num_blocks, block_numel = blocks.shape
    rotated = blocks.clone()
    if block_numel == 0:
        return rotated
    size = 1 << (block_numel.bit_length() - 1)
    spans = [slice(0, size)] if size == block_numel else [slice(0, size), slice(block_numel - size, None)]
    at_once = max(_CACHED_NUMEL // size, 1) if on_host(blocks.device) else num_blocks
    for start in range(0, num_blocks, at_once):
        rows = rotated[start : start + at_once]
        for span in reversed(spans) if inverse else spans:
            rows[:, span] = _walsh_hadamard(rows[:, span])
    return rotated


@dataclass(frozen=True, kw_only=True)
class Hadamard(Transform):
    """Randomized Hadamard rotation: y = H D x / √n for each block of n entries, D random signs from the round's seed.

    It spreads every entry over its whole block, so that the coefficients are nearly Gaussian whatever the tensor was: no
    outlier spoils a scale, and one entry is worth as much as another (which is what a random selection wants and
    top-k does not). Orthonormal, in n log₂ n additions.

    Blocks are stretches of the flat tensor; their size is the largest divisor of its number of entries up to ``block``, so that
    nothing is padded. Where that is no power of two, the first 2^p entries of a block are transformed and then the last 2^p, for
    the largest 2^p that fits: both steps are orthonormal, and so is the whole. A tensor whose size is a prime over ``block`` has
    blocks of one entry, whose rotation is their sign.

    Args:
        block: largest block, entries. Default: 1024.

    Source: Suresh et al., "Distributed mean estimation with limited communication", arXiv 1611.00429, section 3; Vargaftik et
    al., "DRIVE", arXiv 2105.08339, section 6; Tseng et al., "QuIP#", arXiv 2402.04396, section 3.

    >>> spike = torch.zeros(4)
    >>> spike[1] = 2.0
    >>> Hadamard().forward(spike, Round(seed=0)).abs()
    tensor([[1., 1., 1., 1.]])
    """

    name: ClassVar[str] = "hadamard"
    seeded: ClassVar[bool] = True
    block: int = 1024

    def __post_init__(self) -> None:
        self.check_count("block")

    @override
    def grid(self, shape: Shape) -> tuple[int, int]:
        return block_grid(shape, self.block)

    @override
    def largest_gain(self, shape: Shape) -> float:
        """Each of two transforms of n coefficients at most multiplies by √n."""
        return float(max(self.grid(shape)[1], 1))

    @override
    def forward(self, tensor: Tensor, now: Round) -> Tensor:
        blocks = tensor.reshape(self.grid(tuple(tensor.shape)))
        return _rotate(blocks * _signs(blocks, now.seed), inverse=False)

    @override
    def inverse(self, blocks: Tensor, shape: Shape, *, seed: int) -> Tensor:
        return _rotate(blocks, inverse=True).mul_(_signs(blocks, seed)).reshape(shape)


def _signs(blocks: Tensor, seed: int) -> Tensor:
    return random.signs(seed, "hadamard", blocks.numel(), blocks.device).view(blocks.shape)
