"""A codec of three parts: transform -> select -> quantize, with positions as Rice codes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.codec import pack
from muonwire.codec.base import Codec, Encoded, Shape
from muonwire.codec.quantize import Float32, Layout, Quantize, Sign
from muonwire.codec.select import All, Select
from muonwire.codec.transform import Rows, Transform
from muonwire.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Pipeline(Codec):
    """transform | select | quantize.

    A body is the positions (where a selection dropped any), then the values.

    Args:
        transform: tensor to blocks of coefficients. Default: none, the blocks are rows.
        select: which coefficients are sent. Default: all.
        quantize: how their values are written. Default: float32, as they are.

    Raises:
        UsageError: a scale per row with a transform, or per chunk without one.

    >>> import torch
    >>> codec = Pipeline(quantize=Sign(scale="row"))
    >>> codec.decode(codec.encode(torch.tensor([[1.0, -3.0], [0.5, 0.5]])))
    tensor([[ 2.0000, -2.0000],
            [ 0.5000,  0.5000]])
    """

    transform: Transform = Rows()
    select: Select = All()
    quantize: Quantize = Float32()

    def __post_init__(self) -> None:
        scale = self.quantize.scale if isinstance(self.quantize, Sign) else None
        plain = isinstance(self.transform, Rows)
        if (scale == "row" and not plain) or (scale == "chunk" and plain):
            raise UsageError(
                f"codec: sign(scale={scale}) after transform {self.transform}; a scale per row goes without a transform, "
                "a scale per chunk with one"
            )

    def __str__(self) -> str:
        parts = [self.transform] if not isinstance(self.transform, Rows) else []
        return " | ".join(
            str(p) for p in (*parts, *([] if isinstance(self.select, All) else [self.select]), self.quantize)
        )

    def encode_body(self, tensor: Tensor) -> Encoded:
        """See Codec.encode_body."""
        shape = tuple(tensor.shape)
        blocks = self.transform.forward(
            tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))
        )
        positions = self.select.positions(blocks)
        flat = blocks.reshape(-1)
        values = flat if positions is None else flat[positions]
        head = b"" if positions is None else pack.encode_positions(positions.numpy())
        layout = Layout(num_blocks=blocks.shape[0], block_numel=blocks.shape[1], positions=positions)
        data, quantized = self.quantize.encode(values, layout)
        return Encoded(
            body=head + data,
            restore_decoded=lambda: self._restore(quantized, positions, shape).to(tensor.device),
            restore_selected=lambda: self._restore(values, positions, shape).to(tensor.device),
        )

    def decode_body(self, body: bytes, shape: Shape) -> Tensor:
        """See Codec.decode_body."""
        values, positions = self._values(body, shape)
        return self._restore(values, positions, shape)

    def mean_bodies(self, bodies: Sequence[bytes], shape: Shape, *, over: str = "replicas") -> Tensor:
        """See Codec.mean_bodies; the sum is taken in the transform's domain, with one inverse transform."""
        num_blocks, block_numel = self.transform.grid(shape)
        total = torch.zeros(num_blocks * block_numel)
        senders = torch.zeros(num_blocks * block_numel) if over == "senders" else None
        for body in bodies:
            values, positions = self._values(body, shape)
            if positions is None:
                total += values
                if senders is not None:
                    senders += 1
            else:
                total.index_add_(0, positions, values)
                if senders is not None:
                    senders[positions] += 1
        mean = total / len(bodies) if senders is None else total / senders.clamp_(min=1)
        return self.transform.inverse(mean.view(num_blocks, block_numel), shape)

    def estimate_body_bytes(self, shape: Shape) -> int:
        """See Codec.estimate_body_bytes."""
        num_blocks, block_numel = self.transform.grid(shape)
        count = self.select.count(num_blocks, block_numel)
        numel = num_blocks * block_numel
        positions_bytes = pack.estimate_positions_bytes(count, numel) if count < numel else 0
        return positions_bytes + self.quantize.num_bytes(count, num_blocks)

    def _values(self, body: bytes, shape: Shape) -> tuple[Tensor, Tensor | None]:
        num_blocks, block_numel = self.transform.grid(shape)
        count = self.select.count(num_blocks, block_numel)
        positions, read = None, 0
        if count < num_blocks * block_numel:
            array, read = pack.decode_positions(body, count, num_blocks * block_numel)
            positions = torch.from_numpy(array)
        layout = Layout(num_blocks=num_blocks, block_numel=block_numel, positions=positions)
        return self.quantize.decode(body[read:], count, layout), positions

    def _restore(self, values: Tensor, positions: Tensor | None, shape: Shape) -> Tensor:
        num_blocks, block_numel = self.transform.grid(shape)
        if positions is None:
            flat = values
        else:
            flat = torch.zeros(num_blocks * block_numel, dtype=values.dtype)
            flat[positions] = values
        return self.transform.inverse(flat.view(num_blocks, block_numel), shape)
