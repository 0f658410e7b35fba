"""Three levels a value."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import CPU, Field, counts_of, octets, on_host, running_sums, send
from muonwire.codec.quantize import scales
from muonwire.codec.quantize.base import Decoded, Layout, Quantize
from muonwire.codec.quantize.bits import Codes
from muonwire.codec.quantize.rounding import round_magnitudes, uniforms
from muonwire.errors import PayloadError

# Five digits to base 3 make a byte: 3⁵ = 243.
PER_BYTE = 5
# What a byte over 242 makes of a digit, at least.
_NO_DIGIT = 3
_DIGITS = (np.arange(3**PER_BYTE)[:, None] // 3 ** np.arange(PER_BYTE) % 3).astype(np.uint8)
# Thresholds over the mean magnitude that "search" compares, a half octave apart: from Li and Liu's to 127 means.
FACTORS = tuple(0.7 * 2 ** (i / 2) for i in range(16))


def pack_trits(digits: Codes) -> bytes:
    """Pack digits 0, 1, 2, five a byte, the first one lowest; the last byte is filled up with zeros.

    >>> pack_trits(np.array([1, 2, 0, 0, 2, 1], dtype=np.uint8)).hex()
    'a901'
    """
    return _pack(digits).tobytes()


def _pack(digits: Codes) -> Codes:
    fives = np.zeros((-(-digits.size // PER_BYTE), PER_BYTE), dtype=np.uint8)
    fives.reshape(-1)[: digits.size] = digits
    packed = np.zeros(len(fives), dtype=np.uint8)
    for i in reversed(range(PER_BYTE)):
        packed *= np.uint8(3)
        packed += fives[:, i]
    return packed


def unpack_trits(data: bytes, count: int) -> Codes:
    """The inverse of pack_trits for ``count`` digits.

    Raises:
        PayloadError: a byte is over 242.
    """
    packed = np.frombuffer(data, dtype=np.uint8)
    if packed.size and packed.max() >= len(_DIGITS):
        raise PayloadError(f"payload: byte {packed.max()} is not five digits to base 3; the largest is 242")
    return _DIGITS[packed].reshape(-1)[:count]


def _packed(digits: Tensor) -> Field:
    """``pack_trits`` where the digits are."""
    if on_host(digits.device):
        return Field(torch.from_numpy(_pack(digits.numpy())))
    missing = -digits.numel() % PER_BYTE
    fives = (torch.cat([digits, digits.new_zeros(missing)]) if missing else digits).view(-1, PER_BYTE)
    together = fives[:, -1].clone()
    for i in reversed(range(PER_BYTE - 1)):
        together.mul_(3).add_(fives[:, i])
    return Field(together)


def _unpacked(together: Tensor, count: int) -> Tensor:
    """``unpack_trits`` on a device; a byte over 242 gives digits that are none."""
    digits = torch.empty(len(together), PER_BYTE, dtype=torch.uint8, device=together.device)
    left = together
    for i in range(PER_BYTE):
        digits[:, i] = left % 3
        left = left // 3
    digits += (_NO_DIGIT * left)[:, None]
    return digits.view(-1)[:count]


@dataclass(frozen=True, kw_only=True)
class Ternary(Quantize):
    """−s, 0 or +s, in 1.6 bits.

    "threshold": sign(v) · s where |v| > Δ = 0.7 mean|v|, else 0, with s the mean magnitude of the values over Δ: the least squared
    error for this Δ, and near the least of all for Gaussian values.
    "search": the Δ of the least squared error among 0.7 mean|v| · 2^(i/2), i = 0 … 15, which heavy tails need.
    "stochastic": s = max|v|; sign(v) · s with probability |v| / s, else 0: without bias, with an error below s.

    Relative squared error ‖v − decoded‖² / ‖v‖²: Gaussian .19 by "threshold" and "search"; Laplace .28 and .26; a momentum of
    SmolLM2's up_proj .79 and .62. The scale is a bfloat16 number: to nearest (2⁻⁸) for the first two, upwards for the third.

    Args:
        scale: what shares s and Δ: the whole "tensor"; each "row" (without a transform) or "chunk" (with one). Default: "tensor".
        rounding: "threshold", "search" or "stochastic" (the sender draws). Default: "search".

    Raises:
        UsageError: an option outside these.

    >>> from muonwire.codec.pipeline import Pipeline
    >>> codec = Pipeline(quantize=Ternary(rounding="threshold"))
    >>> codec.decode(codec.encode(torch.tensor([3.0, -1.0, 0.1, -2.0])))
    tensor([ 2.5000,  0.0000,  0.0000, -2.5000])

    Source: Li and Liu, "Ternary weight networks", arXiv 1605.04711, section 2; Wen et al., "TernGrad", arXiv 1705.07878.
    """

    name: ClassVar[str] = "ternary"
    scale: str = "tensor"
    rounding: str = "search"

    def __post_init__(self) -> None:
        self.check_choice("scale", scales.SCALES)
        self.check_choice("rounding", ("threshold", "search", "stochastic"))

    @override
    def encode(
        self, values: Tensor, layout: Layout, *, seed: int
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        values = scales.float32_values(values)
        sharing = scales.Sharing(self.scale, values.numel(), layout)
        magnitude = values.abs()
        if self.rounding == "stochastic":
            narrow = scales.round_up(sharing.maximum(magnitude))
            share = magnitude / sharing.spread(narrow.float()).clamp(min=scales.SMALLEST)
            kept = round_magnitudes(share, uniforms(values, seed=seed)) > 0
        else:
            kept, means = self._fit(magnitude, sharing)
            narrow = scales.round_nearest(means)
        digits = kept * values.sign() + 1
        digits = digits.to(torch.uint8)
        scale = sharing.spread(narrow.float())
        return [scales.field(narrow), _packed(digits)], lambda: self._values(digits, scale)

    def _fit(self, magnitude: Tensor, sharing: scales.Sharing) -> tuple[Tensor, Tensor]:
        """Which values are over Δ, and their mean magnitude (float64) for each scale."""
        factors = torch.tensor(FACTORS if self.rounding == "search" else FACTORS[:1], device=CPU)
        factors = send(factors, magnitude.device)
        # Below the normal numbers a quotient would lose its precision.
        mean = sharing.mean(magnitude).float().clamp(min=torch.finfo(torch.float32).tiny)
        # How many of the thresholds each value is over. Values between two of them are counted and added up once; running totals
        # from the top are then those over each threshold.
        over = torch.bucketize(magnitude / sharing.spread(mean), factors)
        cells = sharing.owner() * (len(factors) + 1) + over
        size = sharing.num * (len(factors) + 1)
        counts = counts_of(cells, size).view(sharing.num, -1)
        sums = torch.zeros(size, dtype=torch.float64, device=magnitude.device)
        sums.index_add_(0, cells, magnitude.double())
        totals_count = counts.flip(1).cumsum(1).flip(1)[:, 1:]
        totals = running_sums(sums.view(sharing.num, -1).flip(1)).flip(1)[:, 1:]
        means = totals / totals_count.clamp(min=1)
        # ‖v − decoded‖² = ‖v‖² − (sum over Δ)² / (number over Δ).
        best = (totals * means).argmax(1)
        return over > sharing.spread(best), means.gather(1, best.unsqueeze(1)).view(-1)

    @override
    def decode(self, data: bytes, count: int, layout: Layout) -> Decoded:
        self.check_length(data, count, layout.num_blocks)
        split = scales.num_bytes(self.scale, layout.num_blocks)
        narrow = scales.read(data[:split], what="scale")
        bound = scales.reach(narrow)
        scale = scales.Sharing(self.scale, count, layout).spread(narrow)
        if on_host(layout.device):
            return Decoded(self._values(torch.from_numpy(unpack_trits(data[split:], count)), scale), bound)
        digits = _unpacked(octets(memoryview(data)[split:], layout.device), count)
        values = self._values(digits, scale).masked_fill_(digits >= _NO_DIGIT, math.nan)
        highest = np.frombuffer(data, dtype=np.uint8, offset=split).max(initial=0)
        return Decoded(values, bound if highest < len(_DIGITS) else math.inf)

    def _values(self, digits: Tensor, scale: Tensor) -> Tensor:
        return digits.to(torch.float32).sub_(1).mul_(scale)

    @override
    def num_bytes(self, count: int, num_blocks: int) -> int:
        return scales.num_bytes(self.scale, num_blocks) + -(-count // PER_BYTE)
