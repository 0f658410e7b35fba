"""Quantizers: the selected values to bytes and back."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from muonwire.codec.part import Part
from muonwire.errors import PayloadError, UsageError

SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the values come from: ``positions`` (None: all) in a grid of (num_blocks, block_numel)."""

    num_blocks: int
    block_numel: int
    positions: Tensor | None

    def block_of(self, count: int) -> Tensor:
        """The block of each of the ``count`` values."""
        positions = torch.arange(count) if self.positions is None else self.positions
        return positions // max(self.block_numel, 1)


class Quantize(Part):
    """Values (1-D float32) to bytes and back."""

    @abstractmethod
    def encode(self, values: Tensor, layout: Layout) -> tuple[bytes, Tensor]:
        """The bytes, and the values that ``decode`` gives for them."""

    @abstractmethod
    def decode(self, data: bytes, count: int, layout: Layout) -> Tensor:
        """The ``count`` values behind ``data``.

        Raises:
            PayloadError: ``data`` has the wrong length, or holds a scale that is not finite.
        """

    @abstractmethod
    def num_bytes(self, count: int, num_blocks: int) -> int:
        """Exactly the length of what ``encode`` gives."""

    def check_length(self, data: bytes, count: int, num_blocks: int) -> None:
        """Raise PayloadError where ``data`` cannot be ``count`` values."""
        expected = self.num_bytes(count, num_blocks)
        if len(data) != expected:
            raise PayloadError(
                f"payload: {len(data)} bytes of values; {count} values of {self} take {expected}"
            )


@dataclass(frozen=True, kw_only=True)
class _Float(Quantize):
    dtype: ClassVar[torch.dtype]

    def encode(self, values: Tensor, layout: Layout) -> tuple[bytes, Tensor]:
        """See Quantize.encode."""
        narrow = values.to(self.dtype)
        return narrow.cpu().contiguous().view(torch.uint8).numpy().tobytes(), narrow.to(torch.float32)

    def decode(self, data: bytes, count: int, layout: Layout) -> Tensor:
        """See Quantize.decode."""
        self.check_length(data, count, layout.num_blocks)
        values = torch.frombuffer(bytearray(data), dtype=self.dtype) if count else torch.empty(0)
        if not bool(values.isfinite().all()):
            raise PayloadError(f"payload: a value of its {count} is not finite")
        return values.to(torch.float32)

    def num_bytes(self, count: int, num_blocks: int) -> int:
        """See Quantize.num_bytes."""
        return count * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Float32(_Float):
    """Values as they are, four bytes each."""

    name: ClassVar[str] = "float32"
    dtype: ClassVar[torch.dtype] = torch.float32


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Float):
    """Values rounded to bfloat16 (8 bits of significand), two bytes each."""

    name: ClassVar[str] = "bfloat16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16


SCALES = ("none", "tensor", "row", "chunk")


@dataclass(frozen=True, kw_only=True)
class Sign(Quantize):
    """One bit a value: sign(v) · s, with s the mean magnitude of the values that share it; zero counts as positive.

    Args:
        scale: what shares a scale: the whole "tensor"; each "row" (without a transform) or "chunk" (with one);
            "none": no scale is sent and values decode to ±1, as Psyche's DisTrO has it. Scales are bfloat16.

    Source: 1-bit SGD (Seide et al., 2014); scale by mean magnitude as in EF-signSGD (Karimireddy et al., 1901.09847).
    """

    name: ClassVar[str] = "sign"
    scale: str = "tensor"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UsageError(f"sign: scale is {self.scale!r}; allowed are {', '.join(SCALES)}")

    def _num_scales(self, num_blocks: int) -> int:
        return {"none": 0, "tensor": 1}.get(self.scale, num_blocks)

    def _spread(self, scales: Tensor, count: int, layout: Layout) -> Tensor:
        if self.scale == "none":
            return torch.ones(count)
        if self.scale == "tensor":
            return scales.expand(count)
        return scales[layout.block_of(count)]

    def encode(self, values: Tensor, layout: Layout) -> tuple[bytes, Tensor]:
        """See Quantize.encode."""
        values = values.cpu()
        count = values.numel()
        magnitude = values.abs().to(torch.float32)
        if self.scale == "none" or count == 0:
            scales = torch.zeros(self._num_scales(layout.num_blocks))
        elif self.scale == "tensor":
            scales = magnitude.mean().view(1)
        else:
            blocks = layout.block_of(count)
            sums = torch.zeros(layout.num_blocks).index_add_(0, blocks, magnitude)
            sizes = torch.bincount(blocks, minlength=layout.num_blocks)
            scales = sums / sizes.clamp(min=1)
        narrow = scales.to(torch.bfloat16)
        positive = values >= 0
        bits = np.packbits(positive.numpy(), bitorder="little").tobytes()
        signs = positive.to(torch.float32).mul_(2).sub_(1)
        decoded = signs * self._spread(narrow.to(torch.float32), count, layout)
        return narrow.view(torch.uint8).numpy().tobytes() + bits, decoded

    def decode(self, data: bytes, count: int, layout: Layout) -> Tensor:
        """See Quantize.decode."""
        self.check_length(data, count, layout.num_blocks)
        split = SCALE_BYTES * self._num_scales(layout.num_blocks)
        scales = torch.zeros(0)
        if split:
            scales = torch.frombuffer(bytearray(data[:split]), dtype=torch.bfloat16).to(torch.float32)
            if not bool(scales.isfinite().all()):
                raise PayloadError("payload: a scale is not finite")
        bits = np.unpackbits(np.frombuffer(data[split:], dtype=np.uint8), count=count, bitorder="little")
        signs = torch.from_numpy(bits).to(torch.float32).mul_(2).sub_(1)
        return signs * self._spread(scales, count, layout)

    def num_bytes(self, count: int, num_blocks: int) -> int:
        """See Quantize.num_bytes."""
        return SCALE_BYTES * self._num_scales(num_blocks) + (count + 7) // 8
