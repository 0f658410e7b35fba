"""One bit a value."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from muonwire.codec.quantize.base import Layout, Quantize
from muonwire.errors import PayloadError, UsageError

SCALE_BYTES = 2
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

    def encode(self, values: Tensor, layout: Layout, *, seed: int) -> tuple[bytes, Tensor]:
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
