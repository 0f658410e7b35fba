"""A codec of four parts: transform -> select -> quantize, and how the selected positions are packed."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import items as chosen_items
from muonwire.codec.base import Codec, Encoded, Mean
from muonwire.codec.finite import all_finite
from muonwire.codec.host import CPU, Field, codes_there, octets, on_host, quotient
from muonwire.codec.pack import Ans, Pack
from muonwire.codec.part import Part, Round, Shape, State
from muonwire.codec.quantize import Float32, Layout, Quantize, Sign
from muonwire.codec.quantize.base import Decoded
from muonwire.codec.select import All, Select, TopK, Turns
from muonwire.codec.transform import Chunked, Rows, Transform
from muonwire.errors import PayloadError, UsageError

_SEED = struct.Struct("<I")
# Half of what float32 holds: bounds leave the rounding out.
LARGEST = torch.finfo(torch.float32).max / 2


@dataclass(frozen=True, kw_only=True)
class Pipeline(Codec):
    """transform | select | quantize | pack.

    A body is the round's seed (u32, where decoding needs it), the chosen items (where a selection dropped any, and they do not
    follow from the seed), then the values.

    Args:
        transform: tensor to blocks of coefficients. Default: none, the blocks are rows.
        select: which coefficients are sent. Default: all.
        quantize: how their values are written. Default: float32, as they are.
        pack: how the chosen items are written. Default: ANS.

    Raises:
        UsageError: a scale per row with a transform, or per chunk without one.

    >>> from muonwire.codec import Sign
    >>> codec = Pipeline(quantize=Sign(scale="row"))
    >>> codec.decode(codec.encode(torch.tensor([[1.0, -3.0], [0.5, 0.5]])))
    tensor([[ 2.0000, -2.0000],
            [ 0.5000,  0.5000]])
    """

    transform: Transform = Rows()
    select: Select = All()
    quantize: Quantize = Float32()
    pack: Pack = Ans()

    def __post_init__(self) -> None:
        scale = getattr(self.quantize, "scale", None)
        plain = isinstance(self.transform, Rows)
        if (scale == "row" and not plain) or (scale == "chunk" and plain):
            raise UsageError(
                f"codec: {self.quantize} after transform {self.transform}; a scale per row goes without a transform, "
                "a scale per chunk with one"
            )
        if scale == "shared" and not (plain and isinstance(self.select, All)):
            raise UsageError(
                f"codec: {self.quantize} with transform {self.transform} and selection {self.select}; a scale that replicas share "
                "is for the entries of whole tensors: leave both out"
            )

    def __str__(self) -> str:
        # The quantizer is always named; of the others what is not the default.
        parts: list[Part] = []
        parts += [self.transform] if self.transform != Rows() else []
        parts += [self.select] if self.select != All() else []
        parts += [self.quantize]
        parts += [self.pack] if self.pack != Ans() else []
        return " | ".join(str(p) for p in parts)

    @property
    @override
    def notices_nonfinite(self) -> bool:
        # The largest magnitudes and a transform of chunks pass on what is not finite to the quantizer.
        passed_on = isinstance(self.transform, Rows | Chunked) and isinstance(self.select, All | TopK)
        return passed_on and self.quantize.notices_nonfinite

    @property
    @override
    def unit(self) -> str:
        if not isinstance(self.transform, Rows):
            return "tensor"
        by_row = getattr(self.quantize, "scale", None) == "row" or not isinstance(self.select, All)
        return "row" if by_row else "entry"

    @property
    @override
    def exact(self) -> bool:
        return self.transform.exact

    @property
    @override
    def shares_scale(self) -> bool:
        return isinstance(self.quantize, Sign) and self.quantize.scale == "shared"

    @property
    @override
    def takes_turns(self) -> bool:
        return isinstance(self.select, Turns)

    @override
    def for_replicas(self, replicas: int) -> Codec:
        """With as many parts as replicas at most, so that each entry is somebody's turn in every round."""
        if not isinstance(self.select, Turns) or self.select.parts <= replicas:
            return self
        return replace(self, select=replace(self.select, parts=replicas))

    @override
    def turn_share(self, numel: int) -> float:
        return self.select.count(1, numel) / numel if self.takes_turns and numel else 1.0

    @property
    @override
    def counts_signs(self) -> bool:
        whole = isinstance(self.transform, Rows) and isinstance(self.select, All)
        return whole and isinstance(self.quantize, Sign) and self.quantize.scale in ("none", "shared")

    @override
    def scale_of(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return torch.zeros((), dtype=torch.float64, device=CPU)
        here = tensor if codes_there(tensor.device) else tensor.cpu()
        return here.abs().mean(dtype=torch.float64)

    @override
    def init(self, shape: Shape) -> State:
        return self.transform.init(shape)

    @override
    def encode_body(self, tensor: Tensor, *, seed: int = 0, state: State | None = None) -> Encoded:
        if not codes_there(tensor.device):
            return _moved(self.encode_body(tensor.cpu(), seed=seed, state=state), tensor.device)
        shape = tuple(tensor.shape)
        now = Round(seed=seed) if state is None else Round(seed=seed, state=state)
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        blocks = self.transform.forward(wide, now)
        num_blocks, block_numel = blocks.shape
        fields = [Field(octets(_SEED.pack(seed), CPU))] if self._seeded else []
        flat = blocks.reshape(-1)
        positions = None
        values = flat
        if self.select.count(num_blocks, block_numel) < flat.numel():
            if self.select.shared:
                items = self._drawn(num_blocks, block_numel, seed, blocks.device)
            else:
                items = self.select.choose(blocks)
                groups = self.select.groups(num_blocks, block_numel)
                fields.append(chosen_items.field(items, groups, self.pack))
            positions = self.select.expand(items, num_blocks, block_numel)
            values = _at(flat, positions)
        layout = self._layout(num_blocks, block_numel, positions, blocks.device)
        if isinstance(self.quantize, Sign):
            shared = now.state.get("scale") if self.shares_scale else None
            data, decoded = self.quantize.encode(values, layout, seed=seed, shared=shared)
        else:
            data, decoded = self.quantize.encode(values, layout, seed=seed)
        return Encoded(
            fields=[*fields, *data],
            restore_decoded=lambda: self._restore(decoded(), positions, shape, seed),
            restore_selected=lambda: self._restore(values, positions, shape, seed),
        )

    @override
    def decode_body(self, body: bytes, shape: Shape, *, device: torch.device = CPU) -> Tensor:
        if not codes_there(device):
            return self.decode_body(body, shape).to(device)
        (values, bound), positions, seed = self._values(body, shape, device)
        decoded = self._restore(values, positions, shape, seed)
        # A quantizer decodes to finite values; sums and products of them, as in a transform, may overflow.
        gain = self.transform.largest_gain(shape)
        return decoded if gain <= 1 or gain * bound < LARGEST else _finite(decoded, shape)

    @override
    def mean_bodies(
        self, bodies: Sequence[bytes], shape: Shape, *, over: str = "replicas", device: torch.device = CPU
    ) -> Tensor:
        return self.bounded_mean(bodies, shape, over=over, device=device).values

    @override
    def bounded_mean(
        self, bodies: Sequence[bytes], shape: Shape, *, over: str = "replicas", device: torch.device = CPU
    ) -> Mean:
        """Where the transform is linear the sum is taken in its domain, with one inverse transform."""
        if not codes_there(device):
            here = self.bounded_mean(bodies, shape, over=over)
            return here._replace(values=here.values.to(device))
        if not self.transform.linear or (
            self.transform.seeded and len({b[: _SEED.size] for b in bodies}) > 1
        ):
            decoded = torch.zeros(shape, dtype=self.quantize.decoded_dtype, device=device)
            for body in bodies:
                decoded += self.decode_body(body, shape, device=device)
            return Mean(_finite(quotient(decoded, len(bodies)), shape))
        num_blocks, block_numel = self.transform.grid(shape)
        total = torch.zeros(num_blocks * block_numel, dtype=self.quantize.decoded_dtype, device=device)
        senders = torch.zeros(num_blocks * block_numel, device=device) if over == "senders" else None
        seed, largest = 0, 0.0
        for body in bodies:
            (values, bound), positions, seed = self._values(body, shape, device)
            largest = max(largest, bound)
            _add(total, values, positions)
            if senders is not None:
                _count(senders, positions)
        mean = quotient(total, len(bodies)) if senders is None else total / senders.clamp_(min=1)
        inverse = self.transform.inverse(mean.view(num_blocks, block_numel), shape, seed=seed)
        # Of the sum before it is divided, and of what the transform makes of it.
        reach = len(bodies) * largest * self.transform.largest_gain(shape) if largest else 0.0
        return Mean(inverse if reach < LARGEST else _finite(inverse, shape), reach)

    @override
    def length(self, body: bytes, shape: Shape, *, device: torch.device = CPU) -> Tensor:
        """Of signs of entries with one scale: the scale times the root of their number, without decoding them."""
        count = self.select.count(*self.transform.grid(shape))
        known = isinstance(self.transform, Rows) and isinstance(self.select, All | Turns)
        if known and count and isinstance(self.quantize, Sign) and self.quantize.has_one_scale:
            scale = self.quantize.read_scale(body[_SEED.size if self._seeded else 0 :])
            there = device if codes_there(device) else CPU
            return torch.tensor(scale * math.sqrt(count), dtype=torch.float64, device=there)
        return super().length(body, shape, device=device)

    @override
    def estimate_body_bytes(self, shape: Shape) -> int:
        num_blocks, block_numel = self.transform.grid(shape)
        count = self.select.count(num_blocks, block_numel)
        packed = count < num_blocks * block_numel and not self.select.shared
        return (
            (_SEED.size if self._seeded else 0)
            + (self.pack.estimate_bytes(self.select.groups(num_blocks, block_numel)) if packed else 0)
            + self.quantize.num_bytes(count, num_blocks)
        )

    @property
    def _seeded(self) -> bool:
        return self.transform.seeded or self.select.seeded or self.quantize.seeded

    def _drawn(self, num_blocks: int, block_numel: int, seed: int, device: torch.device) -> Tensor:
        drawn = self.select.draw(num_blocks, block_numel, seed=seed)
        if on_host(device):
            return drawn
        return chosen_items.on_device(drawn.numpy(), self.select.groups(num_blocks, block_numel), device)

    def _layout(
        self, num_blocks: int, block_numel: int, positions: Tensor | None, device: torch.device
    ) -> Layout:
        per_block: int | None = block_numel
        if positions is not None:
            groups = self.select.groups(num_blocks, block_numel)
            by_block = (groups.num_groups, groups.group_numel) == (num_blocks, block_numel)
            per_block = groups.k if by_block else None
        return Layout(
            num_blocks=num_blocks,
            block_numel=block_numel,
            positions=positions,
            per_block=per_block,
            device=device,
        )

    def _values(
        self, body: bytes, shape: Shape, device: torch.device = CPU
    ) -> tuple[Decoded, Tensor | None, int]:
        num_blocks, block_numel = self.transform.grid(shape)
        count = self.select.count(num_blocks, block_numel)
        positions, seed, read = None, 0, 0
        if self._seeded:
            if len(body) < _SEED.size:
                raise PayloadError(f"payload: {len(body)} bytes are fewer than the {_SEED.size} of the seed")
            (seed,) = _SEED.unpack_from(body)
            read = _SEED.size
        if count < num_blocks * block_numel:
            if self.select.shared:
                items = self._drawn(num_blocks, block_numel, seed, device)
            else:
                groups = self.select.groups(num_blocks, block_numel)
                array, length = self.pack.decode(body[read:], groups)
                items, read = chosen_items.on_device(array, groups, device), read + length
            positions = self.select.expand(items, num_blocks, block_numel)
        layout = self._layout(num_blocks, block_numel, positions, device)
        found = self.quantize.decode(body[read:], count, layout)
        return found if isinstance(found, Decoded) else Decoded(found), positions, seed

    def _restore(self, values: Tensor, positions: Tensor | None, shape: Shape, seed: int) -> Tensor:
        num_blocks, block_numel = self.transform.grid(shape)
        if positions is None:
            return self.transform.inverse(values.view(num_blocks, block_numel), shape, seed=seed)
        per_block = self._layout(num_blocks, block_numel, positions, values.device).per_block
        return self.transform.inverse_chosen(values, positions, shape, per_block=per_block, seed=seed)


def _moved(encoded: Encoded, device: torch.device) -> Encoded:
    """The same encoding, whose tensors are wanted on another device."""
    return Encoded(
        fields=encoded.fields,
        restore_decoded=lambda: encoded.decoded.to(device),
        restore_selected=lambda: encoded.selected.to(device),
    )


def _at(flat: Tensor, positions: Tensor) -> Tensor:
    """The values at ``positions``."""
    if on_host(flat.device):
        return torch.from_numpy(flat.numpy()[positions.numpy()])
    return flat.index_select(0, positions)


def _add(total: Tensor, values: Tensor, positions: Tensor | None) -> None:
    """Add values to those at ``positions``, which are distinct, or to all."""
    if positions is None:
        total += values
    elif on_host(total.device):
        # Numpy scatters several times faster than torch.
        total.numpy()[positions.numpy()] += values.numpy()
    else:
        # Each entry gets one value, so that its order among others does not matter.
        total.index_add_(0, positions, values)


def _count(senders: Tensor, positions: Tensor | None) -> None:
    """Add one to those at ``positions``, which are distinct, or to all."""
    if positions is None:
        senders += 1
    elif on_host(senders.device):
        senders.numpy()[positions.numpy()] += 1
    else:
        senders.index_add_(0, positions, torch.ones_like(positions, dtype=senders.dtype))


def _finite(decoded: Tensor, shape: Shape) -> Tensor:
    """Sums and products of values that are finite may not be; on an accelerator the caller looks."""
    if on_host(decoded.device) and not all_finite(decoded):
        raise PayloadError(f"payload: its values are too large: a tensor of shape {shape} overflows")
    return decoded
