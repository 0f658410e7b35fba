"""The contract of a codec: tensor -> bytes -> tensor, with the bytes as they go on the wire.

A codec writes two things: a *body*, the bytes of one tensor whose shape both sides know, and a *payload*, one or many bodies
behind a header that names version, codec, shapes and checksum (codec/payload.py). Optimizers send payloads.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonwire.codec import payload as payloads
from muonwire.codec.finite import Checks, all_finite, check_finite
from muonwire.codec.host import CPU, Field, fetch, length_of, on_host
from muonwire.codec.part import Shape, State
from muonwire.errors import PayloadError, UsageError


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One tensor, encoded: what its bytes are made of stays on its device until they are asked for.

    Args:
        fields: what the body is made of, in order; on a device no memory of the tensor's.
        restore_decoded, restore_selected: make the two tensors below, which not every caller needs.
    """

    fields: Sequence[Field]
    restore_decoded: Callable[[], Tensor]
    restore_selected: Callable[[], Tensor]

    @cached_property
    def body(self) -> bytes:
        """Its bytes; ``Drafts`` makes those of many tensors with one transfer from their device."""
        return _joined(self.fields, fetch([field.values for field in self.fields]))

    @property
    def decoded(self) -> Tensor:
        """What ``decode_body(body)`` gives, to the last bit, on the encoded tensor's device."""
        return self.restore_decoded()

    @property
    def selected(self) -> Tensor:
        """The entries that were sent, before quantization: the rest of the tensor is what selection dropped."""
        return self.restore_selected()


class Mean(NamedTuple):
    """The mean of what several bodies decode to.

    Args:
        values: the mean.
        bound: no magnitude in it is above it, as the host knows without waiting for a device; inf where it does not know.
    """

    values: Tensor
    bound: float = math.inf


class Drafts:
    """The bodies of several tensors before their bytes are fetched, all at once, and whether the tensors are finite."""

    def __init__(self) -> None:
        # Of the tensors, to which each is added.
        self.checks = Checks()
        # By tensor, of its pieces: bytes where they lie in the host's memory, else the fields of their ``Encoded``.
        self._pieces: list[list[bytes | Sequence[Field]]] = []

    def add(self, *pieces: Encoded) -> None:
        """Add the pieces of the tensor that was added to ``checks``, whose values may change from then on."""
        self._pieces.append(
            [one.body if all(field.values.is_cpu for field in one.fields) else one.fields for one in pieces]
        )

    @property
    def values(self) -> list[Tensor]:
        """What is to be fetched."""
        drafts = (piece for pieces in self._pieces for piece in pieces if not isinstance(piece, bytes))
        return [*self.checks.sums, *(field.values for fields in drafts for field in fields)]

    def write(self, fetched: Sequence[Any]) -> list[list[bytes] | None]:
        """By tensor: the bodies of its pieces, None where the tensor is not finite; from the ``values`` as arrays."""
        num_sums = len(self.checks.sums)
        finite = self.checks.results(fetched[:num_sums])
        arrays = iter(fetched[num_sums:])
        found: list[list[bytes] | None] = []
        for pieces, good in zip(self._pieces, finite, strict=True):
            bodies: list[bytes] = []
            for piece in pieces:
                fetched_piece = [] if isinstance(piece, bytes) else [next(arrays) for _ in piece]
                # Of values that are not finite a packer cannot write what was chosen.
                if good:
                    bodies.append(piece if isinstance(piece, bytes) else _joined(piece, fetched_piece))
            found.append(bodies if good else None)
        return found


def _joined(fields: Sequence[Field], fetched: Sequence[Any]) -> bytes:
    return b"".join(field.write(values) for field, values in zip(fields, fetched, strict=True))


class Codec(ABC):
    """Tensor to bytes and back. ``str(codec)`` is its textual form, and ``codec.parse`` reads it."""

    @property
    def notices_nonfinite(self) -> bool:
        """Whether ``encode_body`` itself raises on a value of the CPU that is not finite, which saves a pass over the tensor."""
        return False

    @property
    def unit(self) -> str:
        """What of a tensor can be encoded by itself: each "entry", each "row" (dimension 0), or the "tensor" as a whole.

        An owner of a part of the model gets pieces of such units, each of which is encoded as a tensor of its own.
        """
        return "tensor"

    @property
    def exact(self) -> bool:
        """Whether decoding is arithmetic of integers and single entries, which gives the same bits on all machines."""
        return True

    @property
    def shares_scale(self) -> bool:
        """Whether all replicas encode a tensor with one scale, the mean of their ``scale_of``, which ``state["scale"]`` holds."""
        return False

    @property
    def takes_turns(self) -> bool:
        """Whether replicas send different parts of a tensor in one round: the seed of each is the round's plus its rank."""
        return False

    def for_replicas(self, replicas: int) -> "Codec":
        """The codec as so many replicas use it: this one, but where they take turns and are fewer than the parts."""
        return self

    def turn_share(self, numel: int) -> float:
        """The share of so many entries that a replica sends in its turn; 1 where replicas take no turns."""
        return 1.0

    @property
    def counts_signs(self) -> bool:
        """Whether a value is one sign times a scale that is the same on all replicas, so that their sum is a whole number."""
        return False

    def scale_of(self, tensor: Tensor) -> Tensor:
        """The scale that this replica would give the tensor, where replicas share it: float64, no dimensions, on its device."""
        raise TypeError(f"{self} shares no scale")

    def init(self, shape: Shape) -> State:
        """What the sender keeps from round to round for a tensor of ``shape``; nothing by default."""
        return {}

    @abstractmethod
    def encode_body(self, tensor: Tensor, *, seed: int = 0, state: State | None = None) -> Encoded:
        """Encode one floating tensor of any shape, whose values the caller knows to be finite.

        Args:
            tensor: any shape.
            seed: 32 bits, the same on all replicas in one round, but where they take turns, and another in the next. Default: 0.
            state: what ``init`` made; updated in place. With a shared scale "scale" may stand in it, one number. Default: a cold
                start, and a scale of the tensor's own.
        """

    @abstractmethod
    def decode_body(self, body: bytes, shape: Shape, *, device: torch.device = CPU) -> Tensor:
        """Decode one body into float32 (float64 where the quantizer keeps it) of ``shape`` on ``device``. Default: the CPU.

        Raises:
            PayloadError: the bytes are not a body of this codec for this shape. On another device than the CPU, for which the host
                does not wait here, a value that is none decodes to NaN instead.
        """

    @abstractmethod
    def mean_bodies(
        self, bodies: Sequence[bytes], shape: Shape, *, over: str = "replicas", device: torch.device = CPU
    ) -> Tensor:
        """Decode the replicas' bodies of one tensor and average them, in the order given.

        Args:
            bodies: one a replica, in rank order.
            shape: the tensor's.
            over: "replicas" divides each entry by their number; "senders" by the number of those whose selection holds
                the entry (DeMo's mean, in the transform's domain).
            device: see ``decode_body``. Default: the CPU.
        """

    def bounded_mean(
        self, bodies: Sequence[bytes], shape: Shape, *, over: str = "replicas", device: torch.device = CPU
    ) -> Mean:
        """``mean_bodies`` with a bound, where the codec knows one; without, whoever uses the mean looks at it."""
        return Mean(self.mean_bodies(bodies, shape, over=over, device=device))

    def length(self, body: bytes, shape: Shape, *, device: torch.device = CPU) -> Tensor:
        """‖``decode_body(body)``‖_F on ``device``, see ``length_of``. Default: the CPU."""
        return length_of(self.decode_body(body, shape, device=device))

    @abstractmethod
    def estimate_body_bytes(self, shape: Shape) -> int:
        """Bytes that ``encode_body`` is expected to give for ``shape``; exact where no entropy coding is in play."""

    def encode(self, tensor: Tensor) -> bytes:
        """Encode one tensor into a payload.

        Raises:
            UsageError: the tensor is not floating, or holds a value that is not finite.
        """
        if not tensor.is_floating_point():
            raise UsageError(f"codec: the tensor is {tensor.dtype}; codecs take floating tensors")
        if not (self.notices_nonfinite and on_host(tensor.device)):
            check_finite(tensor)
        return payloads.pack(str(self), [(tuple(tensor.shape), tensor.dtype, self.encode_body(tensor).body)])

    def decode(
        self,
        payload: bytes | bytearray | memoryview,
        *,
        largest_numel: int = payloads.LARGEST_NUMEL,
        device: torch.device | str = CPU,
    ) -> Tensor:
        """Decode a payload of one tensor, into the dtype it had.

        Args:
            payload: bytes from outside.
            largest_numel: most elements that the tensor may have. Default: 2³⁰.
            device: where the tensor is made, to which the bytes alone go. Default: the CPU.

        Raises:
            PayloadError: the bytes are not a payload of this codec with one tensor.
        """
        (entry,) = payloads.unpack(payload, codec_text=str(self), num_tensors=1, largest_numel=largest_numel)
        device = torch.device(device)
        body = self.decode_body(entry.body, entry.shape, device=device)
        decoded = body.to(entry.dtype)
        if not on_host(device):
            if all_finite(decoded):
                return decoded
            # It says what is wrong.
            body = self.decode_body(entry.body, entry.shape)
            decoded = body.to(entry.dtype)
        # Bodies decode to finite numbers; only a narrower dtype can lose that.
        if decoded.dtype != body.dtype and not all_finite(decoded):
            raise PayloadError(f"payload: it decodes to a value that is not finite in {entry.dtype}")
        return decoded

    def estimate_bytes(self, *shapes: Shape) -> int:
        """Bytes of the payload that holds one float32 tensor of each of ``shapes``, before anything is encoded."""
        bodies = [(shape, torch.float32, self.estimate_body_bytes(shape)) for shape in shapes]
        return payloads.num_bytes(str(self), bodies)
