"""Values as they are, in double precision."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.quantize.base import Layout, Quantize
from muonwire.errors import PayloadError


@dataclass(frozen=True, kw_only=True)
class Float64(Quantize):
    """Values as they are, eight bytes each; the mean over replicas is taken in float64 too. For parity in double precision."""

    name: ClassVar[str] = "float64"
    decoded_dtype: ClassVar[torch.dtype] = torch.float64

    @override
    def encode(self, values: Tensor, layout: Layout, *, seed: int) -> tuple[bytes, Tensor]:
        wide = values.cpu().double()
        return wide.numpy().tobytes(), wide

    @override
    def decode(self, data: bytes, count: int, layout: Layout) -> Tensor:
        self.check_length(data, count, layout.num_blocks)
        values = torch.from_numpy(np.frombuffer(data, dtype="<f8").copy())
        if not bool(values.isfinite().all()):
            raise PayloadError(f"payload: a value of its {count} is not finite")
        return values

    @override
    def num_bytes(self, count: int, num_blocks: int) -> int:
        return 8 * count
