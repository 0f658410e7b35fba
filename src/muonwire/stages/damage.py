"""Which replica sent what cannot be averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor

from muonwire.codec.base import Codec
from muonwire.codec.finite import all_finite
from muonwire.codec.part import Shape
from muonwire.errors import PayloadError


def decode_alone(codec: Codec, body: bytes, shape: Shape, *, dtype: torch.dtype) -> Tensor:
    """One replica's body on the CPU, where decoding says what is wrong.

    Raises:
        PayloadError: it does not decode to values that are finite in ``dtype``.
    """
    decoded = codec.decode_body(body, shape).to(dtype)
    if not all_finite(decoded):
        raise PayloadError(f"payload: a decoded value is not finite in {dtype}")
    return decoded


def blame(
    codec: Codec, bodies: Sequence[bytes], shape: Shape, *, dtype: torch.dtype, what: str
) -> PayloadError:
    """The error for the replica whose body does not decode, or else has the largest values.

    Args:
        codec: of the bodies.
        bodies: of the replicas, in rank order; their mean is not finite, or one of them is damaged.
        shape: of what they decode to.
        dtype: in which it must be finite.
        what: they are, for the message.
    """
    peaks = []
    for rank, body in enumerate(bodies):
        try:
            decoded = decode_alone(codec, body, shape, dtype=dtype)
        except PayloadError as error:
            return PayloadError(f"from replica {rank}: {what}: {error}")
        peaks.append(decoded.abs().max().item() if decoded.numel() else 0.0)
    rank = peaks.index(max(peaks))
    return PayloadError(
        f"from replica {rank}: {what}: its values, up to {peaks[rank]:g}, are the largest in a sum over the replicas that is not "
        f"finite in {dtype}"
    )
