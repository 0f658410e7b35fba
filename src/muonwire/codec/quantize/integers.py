"""Values as small integers times a step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import Field, on_host
from muonwire.codec.quantize import scales
from muonwire.codec.quantize.base import Decoded, Layout, Quantize
from muonwire.codec.quantize.bits import packed, unpacked
from muonwire.codec.quantize.rounding import round_magnitudes, uniforms
from muonwire.errors import PayloadError, UsageError

# By the width of a code, of which a byte holds some whole: which bytes hold one of ones alone.
_ONES = {
    width: np.any(
        [np.arange(256) >> shift & (1 << width) - 1 == (1 << width) - 1 for shift in range(0, 8, width)],
        axis=0,
    )
    for width in (2, 4, 8)
}


@dataclass(frozen=True, kw_only=True)
class Int(Quantize):
    """Uniform and symmetric: q · step with the integer q = round(v / step) in [−L, L], L = 2^(bits − 1) − 1.

    step = max|v| / L over the values that share it, rounded up to bfloat16, so that the largest value does not clip: with
    step ≤ (1 + 2⁻⁷) max|v| / L the error is at most step / 2 ("nearest") or step ("stochastic", without bias). q · step is exact in
    float32 and −0 becomes 0. Values that are multiples of a step in bfloat16, with the largest at L of them, pass unchanged.

    With 2 bits the levels are those of ``ternary(rounding=stochastic)``, which takes 1.6 bits.

    Args:
        bits: a value, 2 to 8. Default: 8.
        scale: what shares a step: the whole "tensor"; each "row" (without a transform) or "chunk" (with one). Default: "tensor".
        rounding: "nearest" (ties to even) or "stochastic" (the sender draws). Default: "nearest".

    Raises:
        UsageError: an option outside these.

    >>> from muonwire.codec.pipeline import Pipeline
    >>> codec = Pipeline(quantize=Int(bits=4))
    >>> codec.decode(codec.encode(torch.tensor([7.0, -2.4, 0.4])))
    tensor([ 7., -2.,  0.])

    Source: Alistarh et al., "QSGD", arXiv 1610.02132 (stochastic); Jacob et al., arXiv 1712.05877, section 2.1 (nearest).
    """

    name: ClassVar[str] = "int"
    bits: int = 8
    scale: str = "tensor"
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9):
            raise UsageError(f"int: bits is {self.bits!r}; it must be a whole number from 2 to 8")
        self.check_choice("scale", scales.SCALES)
        self.check_choice("rounding", ("nearest", "stochastic"))

    @property
    def largest_code(self) -> int:
        """L, the largest integer of a value."""
        return (1 << (self.bits - 1)) - 1

    @override
    def encode(
        self, values: Tensor, layout: Layout, *, seed: int
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        values = scales.float32_values(values)
        sharing = scales.Sharing(self.scale, values.numel(), layout)
        limit = self.largest_code
        steps = scales.round_up(sharing.maximum(values.abs()) / limit, largest=scales.LARGEST / limit)
        step = sharing.spread(steps.float())
        # Only a step of zero is raised here; all values behind it are zero.
        scaled = values / step.clamp(min=scales.SMALLEST)
        if self.rounding == "nearest":
            rounded = scaled.round()
        else:
            draws = uniforms(values, seed=seed)
            rounded = round_magnitudes(scaled.abs(), draws).copysign(scaled)
        codes = rounded.add_(limit).clamp_(0, 2 * limit).to(torch.uint8)
        return [scales.field(steps), packed(codes, self.bits)], lambda: self._values(codes, step)

    @override
    def decode(self, data: bytes, count: int, layout: Layout) -> Decoded:
        self.check_length(data, count, layout.num_blocks)
        split = scales.num_bytes(self.scale, layout.num_blocks)
        steps = scales.read(data[:split], what="step")
        bound = scales.reach(steps, self.largest_code)
        codes = unpacked(data[split:], count, self.bits, layout.device)
        step = scales.Sharing(self.scale, count, layout).spread(steps)
        if not on_host(layout.device):
            values = self._values(codes, step).masked_fill_(codes > 2 * self.largest_code, math.nan)
            return Decoded(values, bound if self._has_codes_alone(data[split:]) else math.inf)
        if count and codes.max() > 2 * self.largest_code:
            raise PayloadError(
                f"payload: a value of {self} has the code {codes.max()}, over {2 * self.largest_code}"
            )
        return Decoded(self._values(codes, step), bound)

    def _has_codes_alone(self, data: bytes) -> bool:
        """Whether the host sees that no value has the code of ones alone, which is none; of other widths it does not look."""
        return self.bits in _ONES and not _ONES[self.bits][np.frombuffer(data, dtype=np.uint8)].any()

    def _values(self, codes: Tensor, step: Tensor) -> Tensor:
        return codes.to(torch.float32).sub_(self.largest_code).mul_(step)

    @override
    def num_bytes(self, count: int, num_blocks: int) -> int:
        return scales.num_bytes(self.scale, num_blocks) + (count * self.bits + 7) // 8
