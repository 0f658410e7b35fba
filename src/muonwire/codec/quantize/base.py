"""The contract of a quantizer: the selected values to bytes and back."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from muonwire.codec.host import CPU, Field
from muonwire.codec.part import Part
from muonwire.errors import PayloadError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the values come from: ``positions`` (None: all) in a grid of (num_blocks, block_numel).

    Where each block holds the same number of values, ``per_block`` is that number, and the values lie block by block. ``device`` is
    that of the values.
    """

    num_blocks: int
    block_numel: int
    positions: Tensor | None
    per_block: int | None = None
    device: torch.device = CPU

    def block_of(self, count: int) -> Tensor:
        """The block of each of the ``count`` values."""
        positions = torch.arange(count, device=self.device) if self.positions is None else self.positions
        return positions // max(self.block_numel, 1)


class Decoded(NamedTuple):
    """What bytes decode to.

    Args:
        values: on the layout's device.
        bound: no magnitude is above it, as the host has seen in the bytes, without waiting for the device. Default: it has not.
    """

    values: Tensor
    bound: float = math.inf


class Quantize(Part):
    """Values (1-D float32) to bytes and back.

    What they become stays on the values' device until somebody fetches the fields. There, decoding checks what the host reads, such
    as lengths and scales; what else is wrong with bytes from outside decodes to NaN, for which a caller looks anyway.
    """

    # What values decode to.
    decoded_dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def notices_nonfinite(self) -> bool:
        """Whether ``encode`` raises on a value of the CPU that is not finite."""
        return False

    @abstractmethod
    def encode(
        self, values: Tensor, layout: Layout, *, seed: int
    ) -> tuple[list[Field], Callable[[], Tensor]]:
        """What the bytes are made of, and the values that ``decode`` gives for them, when they are asked for.

        ``seed`` is the round's, for stochastic rounding.
        """

    @abstractmethod
    def decode(self, data: bytes, count: int, layout: Layout) -> Tensor | Decoded:
        """The ``count`` values behind ``data`` on the layout's device, with a bound where one is known; on the CPU all finite.

        Raises:
            PayloadError: ``data`` has the wrong length, or holds a scale that is not finite; on the CPU also a value that is none.
        """

    @abstractmethod
    def num_bytes(self, count: int, num_blocks: int) -> int:
        """The length of what ``encode`` gives; expected where it depends on the values, else exact."""

    def check_length(self, data: bytes, count: int, num_blocks: int) -> None:
        """Raise PayloadError where ``data`` cannot be ``count`` values."""
        expected = self.num_bytes(count, num_blocks)
        if len(data) != expected:
            raise PayloadError(
                f"payload: {len(data)} bytes of values; {count} values of {self} take {expected}"
            )
