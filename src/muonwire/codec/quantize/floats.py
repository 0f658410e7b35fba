"""Values as floating-point numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.finite import all_finite
from muonwire.codec.host import Field, octets, on_host
from muonwire.codec.quantize.base import Decoded, Layout, Quantize
from muonwire.errors import PayloadError


@dataclass(frozen=True, kw_only=True)
class _Float(Quantize):
    dtype: ClassVar[torch.dtype]

    @override
    def encode(
        self, values: Tensor, layout: Layout, *, seed: int
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        # Elsewhere than on the CPU the bytes are fetched later, when the tensor may hold other values.
        narrow = values.to(self.dtype, copy=not on_host(values.device))
        return [Field(narrow.contiguous().view(torch.uint8))], lambda: narrow.to(self.decoded_dtype)

    @override
    def decode(self, data: bytes, count: int, layout: Layout) -> Decoded:
        self.check_length(data, count, layout.num_blocks)
        values = octets(data, layout.device).view(self.dtype)
        if not on_host(layout.device):
            return Decoded(values.to(self.decoded_dtype), self._largest(data))
        # A sum takes less time than a search for the largest, which saves a look at the whole tensor where some of it was chosen.
        chosen = layout.positions is not None and count > 0
        bound = float(values.abs().max()) if chosen else math.inf
        if not (math.isfinite(bound) if chosen else all_finite(values)):
            raise PayloadError(f"payload: a value of its {count} is not finite")
        return Decoded(values.to(self.decoded_dtype), bound)

    def _largest(self, data: bytes) -> float:
        """The largest magnitude in the bytes, which the host looks at; inf where one is not finite."""
        size = self.dtype.itemsize
        bits = np.frombuffer(data, dtype=f"<i{size}")
        # Without their signs the bits of numbers are ordered as the magnitudes are; those of NaN are the last.
        largest = (bits & np.iinfo(bits.dtype).max).max(initial=0)
        number = torch.from_numpy(largest.reshape(1)).view(self.dtype).item()
        return number if math.isfinite(number) else math.inf

    @override
    def num_bytes(self, count: int, num_blocks: int) -> int:
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


@dataclass(frozen=True, kw_only=True)
class Float64(_Float):
    """Values as they are, eight bytes each; the mean over replicas is taken in float64 too. For parity in double precision."""

    name: ClassVar[str] = "float64"
    dtype: ClassVar[torch.dtype] = torch.float64
    decoded_dtype: ClassVar[torch.dtype] = torch.float64
