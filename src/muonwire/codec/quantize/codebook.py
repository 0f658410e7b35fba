"""Values as the nearest of a few levels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import CPU, Field, counts_of, on_host, running_sums, send
from muonwire.codec.quantize import scales
from muonwire.codec.quantize.base import Decoded, Layout, Quantize
from muonwire.codec.quantize.bits import packed, unpacked
from muonwire.errors import UsageError

FITS = ("lloyd", "gaussian")
ROUNDS = 100

# The positive half of the levels of least squared error for the normal distribution; the other half mirrors it.
# Source: Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I; Lloyd (1982).
GAUSSIAN = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


def gaussian_levels(bits: int) -> Tensor:
    """The 2^bits levels (float32, ascending) for the standard normal distribution, on the CPU."""
    half = torch.tensor(GAUSSIAN[bits], device=CPU)
    return torch.cat([-half.flip(0), half])


def _cells(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, sums and means (float64) of the values that round to the same bfloat16 number, in ascending order of these.

    On an accelerator, which would have to tell the host how many numbers occur, also of those that do not: they count nothing, and
    their mean is that of the last one before that does (of the first ones the first).
    """
    signed = values.to(torch.bfloat16).view(torch.int16).int()
    # Signed magnitudes as integers stand in the order of the numbers; -0 and 0 share a cell.
    order = torch.where(signed < 0, -(signed & 0x7FFF), signed) + (1 << 15)
    counts = counts_of(order, 1 << 16)
    sums = torch.zeros(1 << 16, dtype=torch.float64, device=values.device)
    sums.index_add_(0, order, values.double())
    if on_host(values.device):
        present = counts > 0
        counts, sums = counts[present], sums[present]
        return counts.double(), sums, sums / counts
    means = torch.where(counts > 0, sums / counts.clamp(min=1), -torch.inf).cummax(0).values
    least = torch.where(counts > 0, means, torch.inf).min()
    return counts.double(), sums, means.maximum(least)


def lloyd_levels(values: Tensor, bits: int) -> Tensor:
    """2^bits levels (float64, ascending) that Lloyd's iteration reaches from groups of equal total magnitude.

    Each level is the mean of the values nearest to it, up to the values that round to one bfloat16 number, which stay together:
    so a round costs the same however many values there are, and no outlier is missed as in a sample.

    >>> lloyd_levels(torch.tensor([0.0, 1.0, 9.0, 11.0]), 1)
    tensor([ 0.5000, 10.0000], dtype=torch.float64)
    """
    num_levels = 1 << bits
    if values.numel() == 0:
        return torch.zeros(num_levels, dtype=torch.float64, device=values.device)
    counts, sums, means = _cells(values)
    ends = send(torch.tensor([0, len(counts)], device=CPU), values.device)
    counts_before = torch.cat([counts.new_zeros(1), running_sums(counts)])
    sums_before = torch.cat([sums.new_zeros(1), running_sums(sums)])
    magnitude = running_sums(sums.abs())
    shares = magnitude[-1] * torch.arange(1, num_levels, device=values.device) / num_levels
    edges = torch.cat([ends[:1], torch.searchsorted(magnitude, shares), ends[1:]])
    # A group without values stays where it starts.
    levels = means[edges[:-1].clamp(max=len(means) - 1)]
    for _ in range(ROUNDS):
        sizes = counts_before[edges].diff()
        moved = sums_before[edges].diff() / sizes.clamp(min=1)
        levels = torch.where(sizes > 0, moved, levels).cummax(0).values
        inner = torch.searchsorted(means, (levels[1:] + levels[:-1]) / 2, right=True)
        last, edges = edges, torch.cat([ends[:1], inner, ends[1:]])
        # On an accelerator the rounds that change nothing cost less than asking for it.
        if on_host(values.device) and torch.equal(last, edges):
            break
    return levels


@dataclass(frozen=True, kw_only=True)
class Codebook(Quantize):
    """The nearest of 2^bits levels times a scale, the root mean square of the values that share it.

    "lloyd": the levels are fitted to the values by the sender, one set a tensor, and travel in bfloat16;
    "gaussian": the levels are those of least squared error for a normal distribution, and do not travel.

    The error of a value is its distance to the nearest of the levels times the scale. Fitted levels have no bias over the tensor,
    up to their rounding (2⁻⁸). Rounding is never stochastic: beyond its outermost levels a codebook cannot be unbiased.

    Relative squared error ‖v − decoded‖² / ‖v‖² at 2, 3 and 4 bits, of 2¹⁸ drawn values and of two momenta of
    benchmarks/data/momentum.safetensors:

    | values | scale | lloyd | gaussian | int |
    |---|---|---|---|---|
    | Gaussian | tensor | .117 .035 .010 | .117 .035 .010 | .93 .19 .03 |
    | Laplace | tensor | .178 .055 .015 | .19 .07 .03 | .98 .48 .13 |
    | training q_proj | tensor | .23 .07 .02 | .26 .13 .07 | .94 .52 .19 |
    | training q_proj | row | .11 .03 .01 | .11 .03 .01 | .65 .08 .02 |
    | SmolLM2 up_proj | tensor | .49 .21 .07 | .73 .60 .55 | .94 .71 .52 |
    | SmolLM2 up_proj | row | .40 .08 .02 | .59 .48 .41 | .46 .35 .25 |

    Levels at the means of groups of equal counts are worse than "lloyd" everywhere (up_proj with one scale .78 .71 .65), so they
    are not offered.

    Args:
        bits: a value, 1 to 4. Default: 4.
        scale: what shares a scale: the whole "tensor"; each "row" (without a transform) or "chunk" (with one). Default: "tensor".
        fit: "lloyd" or "gaussian". Default: "lloyd".

    Raises:
        UsageError: an option outside these.

    >>> from muonwire.codec.pipeline import Pipeline
    >>> codec = Pipeline(quantize=Codebook(bits=1))
    >>> codec.decode(codec.encode(torch.tensor([-1.0, -1.0, 2.0, 2.0]))).round(decimals=1)
    tensor([-1., -1.,  2.,  2.])

    Source: Lloyd, "Least squares quantization in PCM" (1982); a fitted 2-bit codebook for Muon's weight changes: MuLoCo (2025).
    """

    name: ClassVar[str] = "codebook"
    bits: int = 4
    scale: str = "tensor"
    fit: str = "lloyd"

    def __post_init__(self) -> None:
        if self.bits not in GAUSSIAN:
            raise UsageError(f"codebook: bits is {self.bits!r}; it must be a whole number from 1 to 4")
        self.check_choice("scale", scales.SCALES)
        self.check_choice("fit", FITS)

    @override
    def encode(
        self, values: Tensor, layout: Layout, *, seed: int
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        values = scales.float32_values(values)
        sharing = scales.Sharing(self.scale, values.numel(), layout)
        narrow = scales.round_up(sharing.mean(values.double().square()).sqrt())
        scale = sharing.spread(narrow.float())
        # Only a scale of zero is raised here; all values behind it are zero.
        unit = values / scale.clamp(min=scales.SMALLEST)
        if self.fit == "gaussian":
            levels = gaussian_levels(self.bits)
            # A multiple of the scale past float32's range would not be finite.
            limit = scales.LARGEST / levels[-1].item()
            levels, book = send(levels, values.device), []
            narrow = narrow.clamp(max=scales.below(limit))
            scale = sharing.spread(narrow.float())
        else:
            rounded = self._narrow_levels(lloyd_levels(unit, self.bits), narrow)
            levels, book = rounded.float(), [scales.field(rounded)]
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        fields = [scales.field(narrow), *book, packed(codes.to(torch.uint8), self.bits)]
        return fields, lambda: levels[codes] * scale

    @staticmethod
    def _narrow_levels(levels: Tensor, narrow: Tensor) -> Tensor:
        largest_scale = narrow.double().max() if narrow.numel() else levels.new_zeros(())
        bound = scales.round_down(scales.LARGEST / largest_scale.clamp(min=1.0))
        return scales.round_nearest(levels.abs()).minimum(bound) * levels.sign().to(torch.bfloat16)

    @override
    def decode(self, data: bytes, count: int, layout: Layout) -> Decoded:
        self.check_length(data, count, layout.num_blocks)
        split = scales.num_bytes(self.scale, layout.num_blocks)
        narrow = scales.read(data[:split], what="scale")
        book = self._book_bytes()
        levels = scales.read(data[split : split + book], what="level") if book else gaussian_levels(self.bits)
        bound = scales.reach(narrow, levels.abs().max().item())
        codes = unpacked(data[split + book :], count, self.bits, layout.device).int()
        scale = scales.Sharing(self.scale, count, layout).spread(narrow)
        return Decoded(send(levels, layout.device)[codes] * scale, bound)

    def _book_bytes(self) -> int:
        return scales.SCALE_BYTES << self.bits if self.fit == "lloyd" else 0

    @override
    def num_bytes(self, count: int, num_blocks: int) -> int:
        return scales.num_bytes(self.scale, num_blocks) + self._book_bytes() + (count * self.bits + 7) // 8
