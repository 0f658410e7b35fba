"""One bit a value."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import packing
from muonwire.codec.finite import all_finite, check_finite
from muonwire.codec.host import Field, as_bytes, counts_of, octets, on_host, send
from muonwire.codec.memory import strips
from muonwire.codec.pack.fields import digits_bytes, pack_digits, unpack_digits
from muonwire.codec.quantize import scales
from muonwire.codec.quantize.base import Decoded, Layout, Quantize
from muonwire.errors import PayloadError

Bytes = npt.NDArray[np.uint8]
_DIGITS = struct.Struct("<HH")
_ONE_SCALE = ("tensor", "shared")
# The eight signs that each byte stands for, the first in its lowest bit.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_SIGNS = _BITS.astype(np.float32) * 2 - 1
# The differences of bfloat16 scales that lie within an octave.
_EXPECTED_BASE = 1 << 7


@dataclass(frozen=True, kw_only=True)
class Sign(Quantize):
    """One bit a value: sign(v) · s, with s the mean magnitude of the values that share it; zero counts as positive.

    Scales of chunks, of which there is one for a few dozen values, go as their differences from the smallest: its bits (u16), the
    largest difference (u16), the differences as digits of that base.

    Args:
        scale: what shares a scale: the whole "tensor"; each "row" (without a transform) or "chunk" (with one);
            "shared": the tensor on all replicas, which an exchange then gives the mean of their mean magnitudes, so that the sum of
            what they send is a whole number of scales (without transform and selection; alone it is as "tensor");
            "none": no scale is sent and values decode to ±1, as Psyche's DisTrO has it. Scales are bfloat16.

    Source: 1-bit SGD (Seide et al., 2014); scale by mean magnitude as in EF-signSGD (Karimireddy et al., 1901.09847).
    """

    name: ClassVar[str] = "sign"
    scale: str = "tensor"

    def __post_init__(self) -> None:
        self.check_choice("scale", ("none", "shared", *scales.SCALES))

    @property
    def has_one_scale(self) -> bool:
        """Whether all values have the same magnitude."""
        return self.scale in ("none", *_ONE_SCALE)

    def read_scale(self, data: bytes) -> float:
        """The magnitude that all values have, where they have one.

        Raises:
            PayloadError: ``data`` ends in the scale, or that is not finite.
        """
        shared, _ = self._unpack_scales(data, 1)
        return 1.0 if self.scale == "none" else float(shared[0])

    @property
    @override
    def notices_nonfinite(self) -> bool:
        """Where there are scales: a value of the CPU that is not finite makes the mean magnitude so."""
        return self.scale != "none"

    @override
    def encode(
        self, values: Tensor, layout: Layout, *, seed: int, shared: Tensor | None = None
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        if self.scale == "none":
            return self._with_bits(values, None, values.new_zeros(0), layout)
        num_scales = self._num_scales(layout.num_blocks)
        even = self.scale in _ONE_SCALE or layout.per_block is not None
        here = on_host(values.device)
        bits: Bytes | None = None
        if shared is not None:
            means = send(shared.reshape(1).to(torch.float32), values.device)
        elif num_scales and even and values.numel():
            rows = values.view(num_scales, -1)
            means, bits = _even_scales(rows) if here else (_device_scales(rows), None)
        else:
            means = (
                _uneven_scales(values, layout) if num_scales and not even else values.new_zeros(num_scales)
            )
            if here and not all_finite(means):
                check_finite(values)
        narrow = scales.round_nearest(means)
        written = Field(narrow.view(torch.int16), self._pack_scales)
        fields, decoded = self._with_bits(values, bits, narrow, layout)
        return [written, *fields], decoded

    def _with_bits(
        self, values: Tensor, bits: Bytes | None, narrow: Tensor, layout: Layout
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        """The signs, which ``bits`` are where they are packed already, and the values that they and the scales stand for."""
        count = values.numel()
        if not on_host(values.device):
            packed = packing.pack(values >= 0, 1)
            return [Field(packed)], lambda: self._device_signs(packed, narrow.float(), count, layout)
        octets_here = _packed_signs(values) if bits is None else bits
        return [Field(torch.from_numpy(octets_here))], lambda: self._signs(
            octets_here, narrow.float(), count, layout
        )

    @override
    def decode(self, data: bytes, count: int, layout: Layout) -> Decoded:
        shared, read = self._unpack_scales(data, layout.num_blocks)
        if len(data) - read != (count + 7) // 8:
            raise PayloadError(
                f"payload: {len(data) - read} bytes of values; {count} values of {self} take {(count + 7) // 8}"
            )
        bound = 1.0 if self.scale == "none" else scales.reach(shared)
        if on_host(layout.device):
            bits = np.frombuffer(data, dtype=np.uint8, offset=read)
            return Decoded(self._signs(bits, shared, count, layout), bound)
        packed = octets(memoryview(data)[read:], layout.device)
        return Decoded(self._device_signs(packed, send(shared, layout.device), count, layout), bound)

    def _device_signs(self, packed: Tensor, shared: Tensor, count: int, layout: Layout) -> Tensor:
        """The values behind packed signs (uint8), of which ``shared`` are the scales (float32), on an accelerator."""
        signs = packing.unpack(packed, count, 1).to(torch.float32).mul_(2).sub_(1)
        if self.scale == "none" or not count:
            return signs
        if self.scale in _ONE_SCALE or layout.per_block is not None:
            return signs.view(len(shared), -1).mul_(shared[:, None]).view(-1)
        return signs.mul_(shared[layout.block_of(count)])

    def _signs(self, bits: Bytes, shared: Tensor, count: int, layout: Layout) -> Tensor:
        """The same on the CPU."""
        one = self.scale in _ONE_SCALE
        if self.scale == "none" or one:
            # One scale: its table holds the values themselves.
            table = _SIGNS if self.scale == "none" else _SIGNS * shared.numpy()
            return torch.from_numpy(np.take(table, bits, axis=0).reshape(-1)[:count])
        if layout.per_block is None:
            signs = torch.from_numpy(np.take(_SIGNS, bits, axis=0).reshape(-1)[:count])
            return signs.mul_(shared[layout.block_of(count)])
        return _even_signs(bits, shared, layout.per_block)

    @override
    def num_bytes(self, count: int, num_blocks: int) -> int:
        size = scales.SCALE_BYTES * self._num_scales(num_blocks)
        if self.scale == "chunk" and num_blocks > 1:
            size = _DIGITS.size + digits_bytes(num_blocks, _EXPECTED_BASE)
        return size + (count + 7) // 8

    def _num_scales(self, num_blocks: int) -> int:
        return 0 if self.scale == "none" else 1 if self.scale in _ONE_SCALE else num_blocks

    def _pack_scales(self, bits: Any) -> bytes:
        """The bits (int16) of scales as they are, or as digits."""
        if self.scale != "chunk" or bits.size < 2:
            return as_bytes(bits)
        # The bits of magnitudes are ordered as the magnitudes are.
        above = bits.astype(np.int64)
        lowest = int(above.min())
        above -= lowest
        return _DIGITS.pack(lowest, int(above.max())) + pack_digits(above, int(above.max()) + 1)

    def _unpack_scales(self, data: bytes, num_blocks: int) -> tuple[Tensor, int]:
        count = self._num_scales(num_blocks)
        read, lowest, largest = scales.SCALE_BYTES * count, 0, 0
        digits = self.scale == "chunk" and count > 1
        if digits and len(data) >= _DIGITS.size:
            lowest, largest = _DIGITS.unpack_from(data)
            read = _DIGITS.size + digits_bytes(count, largest + 1)
        if len(data) < read:
            raise PayloadError(f"payload: {len(data)} bytes of values end in the {count} scales of {self}")
        if digits:
            bits = lowest + unpack_digits(data[_DIGITS.size : read], count, largest + 1)
            return scales.read(bits.clip(max=0x7FFF).astype(np.int16).tobytes(), what="scale"), read
        return scales.read(data[:read], what="scale"), read


def _octets(rows: slice, per_row: int) -> slice:
    """The bytes of the signs of ``rows``, the first of which begins a byte."""
    return slice(rows.start * per_row // 8, (rows.stop * per_row + 7) // 8)


def _even_scales(rows: Tensor) -> tuple[Tensor, Bytes]:
    """Mean magnitude of each row, and the bits of all signs, in one pass over memory.

    Raises:
        UsageError: a value is not finite.
    """
    num_rows, numel = rows.shape
    values = rows.numpy()
    sums, ones = torch.empty(num_rows, dtype=rows.dtype), torch.ones(numel, dtype=rows.dtype)
    bits = np.empty((rows.numel() + 7) // 8, dtype=np.uint8)
    magnitudes = positive = None
    for strip in strips(num_rows, numel, multiple=8):
        part = values[strip]
        if magnitudes is None or len(part) != len(magnitudes):
            magnitudes, positive = np.empty_like(part), np.empty(part.shape, dtype=bool)
        bits[_octets(strip, numel)] = np.packbits(np.greater_equal(part, 0, out=positive), bitorder="little")
        # A product with ones is the fastest sum.
        torch.mv(torch.from_numpy(np.abs(part, out=magnitudes)), ones, out=sums[strip])
    means = sums / numel
    if not all_finite(means):
        check_finite(rows)
        means = rows.to(torch.float64).abs().mean(dim=1)
    return means.to(torch.float32), bits


def _packed_signs(values: Tensor) -> Bytes:
    return np.packbits(values.numpy() >= 0, bitorder="little")


def _device_scales(rows: Tensor) -> Tensor:
    """Mean magnitude of each row on an accelerator, summed in float64, which no sum of float32 values leaves."""
    return rows.abs().mean(dim=1, dtype=torch.float64).to(torch.float32)


def _uneven_scales(values: Tensor, layout: Layout) -> Tensor:
    """Mean magnitude of the values of each block, 0 where it has none."""
    if not on_host(values.device):
        index = layout.block_of(values.numel())
        totals = torch.zeros(layout.num_blocks, dtype=torch.float64, device=values.device)
        totals.index_add_(0, index, values.abs().double())
        return (totals / counts_of(index, layout.num_blocks).clamp_(min=1)).to(torch.float32)
    blocks = layout.block_of(values.numel()).numpy()
    sums = np.bincount(blocks, weights=values.abs().numpy(), minlength=layout.num_blocks)
    sizes = np.bincount(blocks, minlength=layout.num_blocks)
    return torch.from_numpy(sums / sizes.clip(min=1)).to(torch.float32)


def _even_signs(bits: Bytes, scales: Tensor, per_row: int) -> Tensor:
    """The signs behind ``bits`` times the scale of their row."""
    values = np.empty((len(bits), 8), dtype=np.float32)
    rows = torch.from_numpy(values).view(-1)[: len(scales) * per_row].view(len(scales), per_row)
    for strip in strips(len(scales), per_row, multiple=8):
        octets = _octets(strip, per_row)
        np.take(_SIGNS, bits[octets], axis=0, out=values[octets], mode="clip")
        rows[strip] *= scales[strip, None]
    return rows.view(-1)
