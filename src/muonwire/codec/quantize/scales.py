"""What shares a scale, and how scales are rounded, written and read."""

import numpy as np
import torch
from torch import Tensor

from muonwire.codec.host import CPU, Field, counts_of, send
from muonwire.codec.quantize.base import Layout
from muonwire.errors import PayloadError

SCALES = ("tensor", "row", "chunk")
SCALE_BYTES = 2
LARGEST = torch.finfo(torch.float32).max
# bfloat16's smallest subnormal number; nothing that is rounded up to bfloat16 is smaller, unless it is zero.
SMALLEST = 2.0**-133


def num_scales(scale: str, num_blocks: int) -> int:
    """One for "tensor", one a block for "row" and "chunk"."""
    return 1 if scale == "tensor" else num_blocks


def num_bytes(scale: str, num_blocks: int) -> int:
    """Bytes of the scales."""
    return SCALE_BYTES * num_scales(scale, num_blocks)


def float32_values(values: Tensor) -> Tensor:
    """The values in float32; what is beyond its range becomes its largest number."""
    return values.to(torch.float32).clamp(-LARGEST, LARGEST)


class Sharing:
    """Which of the scales each value uses: the tensor's one, or its block's.

    Args:
        scale: one of SCALES.
        count: number of values.
        layout: where they come from.
    """

    def __init__(self, scale: str, count: int, layout: Layout) -> None:
        self.num = num_scales(scale, layout.num_blocks)
        self._count = count
        self._device = layout.device
        # Values of a whole tensor, and of whole blocks, are rows of a matrix; only scattered ones need an index.
        scattered = scale != "tensor" and layout.positions is not None
        self._index = layout.block_of(count) if scattered else None

    def _by_scale(self, values: Tensor) -> Tensor:
        return values.view(self.num, self._count // max(self.num, 1))

    def owner(self) -> Tensor:
        """The number of each value's scale (int64)."""
        if self._index is not None:
            return self._index
        numbers = torch.arange(self.num, device=self._device)
        return numbers.repeat_interleave(self._count // max(self.num, 1))

    def maximum(self, magnitude: Tensor) -> Tensor:
        """The largest magnitude (float64) behind each scale; 0 where there are no values."""
        if self._count == 0:
            return self._zeros(torch.float64)
        if self._index is None:
            return self._by_scale(magnitude).amax(1).double()
        return self._zeros(torch.float32).scatter_reduce_(0, self._index, magnitude, "amax").double()

    def total(self, values: Tensor) -> Tensor:
        """The sum (float64, which no sum of float32 values leaves) behind each scale."""
        if self._index is None:
            return self._by_scale(values).sum(1, dtype=torch.float64)
        return self._zeros(torch.float64).index_add_(0, self._index, values.double())

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.num, dtype=dtype, device=self._device)

    def mean(self, values: Tensor) -> Tensor:
        """The mean (float64) behind each scale; 0 where there are no values."""
        if self._index is None:
            return self.total(values) / max(self._count // max(self.num, 1), 1)
        return self.total(values) / counts_of(self._index, self.num).clamp_(min=1)

    def spread(self, scales: Tensor) -> Tensor:
        """The scale of each value, of scales that may come from the host."""
        scales = send(scales, self._device)
        if self._index is None:
            return scales.repeat_interleave(self._count // max(self.num, 1))
        return scales[self._index]


def _step_bits(narrow: Tensor, where: Tensor, by: int) -> Tensor:
    # The bits of bfloat16 numbers that are not negative count upwards as integers.
    return (narrow.view(torch.int16) + by * where.to(torch.int16)).view(torch.bfloat16)


def round_down(exact: Tensor) -> Tensor:
    """Float64 numbers ≥ 0 to the bfloat16 number at or below, at most 2⁻⁷ of it (or 2⁻¹³³) away."""
    narrow = exact.clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)
    return _step_bits(narrow, narrow.double() > exact, -1)


def below(number: float) -> float:
    """``round_down`` of a number of the host, which ``clamp`` takes beside tensors of any device."""
    return float(round_down(torch.tensor(number, dtype=torch.float64, device=CPU)))


def round_up(exact: Tensor, *, largest: float = LARGEST) -> Tensor:
    """Float64 numbers ≥ 0 to the bfloat16 number at or above, at most 2⁻⁷ of it (or 2⁻¹³³) away.

    Args:
        exact: float64.
        largest: what the result never exceeds, whatever ``exact`` is. Default: float32's largest number.

    >>> round_up(torch.tensor([0.0, 1.0, 1.001], dtype=torch.float64))
    tensor([0.0000, 1.0000, 1.0078], dtype=torch.bfloat16)
    """
    limit = below(largest)
    narrow = exact.clamp(max=limit).to(torch.bfloat16)
    return _step_bits(narrow, narrow.double() < exact, 1).clamp(max=limit)


def round_nearest(exact: Tensor) -> Tensor:
    """Float64 numbers ≥ 0 to the nearest bfloat16 number, at most 2⁻⁸ of it (or 2⁻¹³⁴) away, and finite."""
    return exact.clamp(max=torch.finfo(torch.bfloat16).max).to(torch.bfloat16)


def write(narrow: Tensor) -> bytes:
    """Bfloat16 numbers of the CPU as bytes, two each."""
    return narrow.contiguous().view(torch.uint8).numpy().tobytes()


def field(narrow: Tensor) -> Field:
    """Bfloat16 numbers where they are, two bytes each."""
    return Field(narrow.contiguous().view(torch.int16))


def read(data: bytes, *, what: str) -> Tensor:
    """Bfloat16 numbers as float32, on the CPU.

    Raises:
        PayloadError: one is not finite.
    """
    if not data:
        return torch.zeros(0, device=CPU)
    numbers = torch.from_numpy(np.frombuffer(data, dtype=np.int16).copy()).view(torch.bfloat16).float()
    if not bool(numbers.isfinite().all()):
        raise PayloadError(f"payload: a {what} is not finite")
    return numbers


def reach(scales: Tensor, largest_code: float = 1.0) -> float:
    """The largest magnitude of a scale (on the CPU) times the largest code.

    Raises:
        PayloadError: it is beyond float32.
    """
    largest = scales.abs().max().item() if scales.numel() else 0.0
    if not largest * largest_code <= LARGEST:
        raise PayloadError(
            f"payload: scale {largest:g} times {largest_code:g} is not a finite float32 number"
        )
    return largest * largest_code
