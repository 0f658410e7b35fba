"""A digest of the weights, compared between replicas: the proof that they are bit-identical."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from muonwire.errors import DivergedReplicasError, ExchangeError
from muonwire.transport.base import Transport

DIGEST_BYTES = 8


def digest(tensor: Tensor) -> bytes:
    """Eight bytes of BLAKE2b over the tensor's own bits: equal bits give equal digests, -0.0 and 0.0 differ."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=DIGEST_BYTES).digest()


def digest_all(named: Iterable[tuple[str, Tensor]]) -> bytes:
    """Eight bytes over all tensors."""
    return hashlib.blake2b(b"".join(digest(t) for _, t in named), digest_size=DIGEST_BYTES).digest()


def check_replicas(named_tensors: Iterable[tuple[str, Tensor]], transport: Transport) -> str:
    """Compare the weights of all replicas, and return their common digest as hexadecimal text.

    Costs 8 bytes a replica where they agree, and 8 bytes a tensor more where they do not.

    Args:
        named_tensors: the same names in the same order on every replica.
        transport: between the replicas to compare.

    Raises:
        DivergedReplicasError: names the first tensor that differs, and the ranks that differ from rank 0 in it.
    """
    named = [(name, digest(tensor)) for name, tensor in named_tensors]
    whole = hashlib.blake2b(b"".join(d for _, d in named), digest_size=DIGEST_BYTES).digest()
    if len(set(transport.gather(whole, purpose="digest"))) == 1:
        return whole.hex()
    everyone = transport.gather(b"".join(d for _, d in named), purpose="digest")
    for i, (name, _) in enumerate(named):
        seen = [all_of_one[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES] for all_of_one in everyone]
        differing = [rank for rank, d in enumerate(seen) if d != seen[0]]
        if differing:
            raise DivergedReplicasError(
                f"replicas diverged: parameter {name!r} is the first of {len(named)} that differs; on rank(s) "
                f"{', '.join(map(str, differing))} its digest is not that of rank 0 ({seen[0].hex()}). Look for "
                "arithmetic whose rounding depends on the machine, or a parameter that one replica changes alone"
            )
    raise DivergedReplicasError(f"replicas diverged in their number of parameters: this one has {len(named)}")


def check_agreement(text: str, transport: Transport, *, what: str, note: str = "") -> list[str]:
    """Make sure that all replicas have the same ``text``, at 8 bytes a replica, and tell each other a note on the way.

    Args:
        text: what must be the same.
        transport: between the replicas.
        what: what the text describes, for the message.
        note: what may differ. Default: nothing.

    Returns:
        the replicas' notes, in rank order.

    Raises:
        ExchangeError: names the replicas whose ``what`` is not that of replica 0.
    """
    own = hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()
    told = transport.gather(own + note.encode(), purpose="control")
    seen = [message[:DIGEST_BYTES] for message in told]
    differing = [rank for rank, d in enumerate(seen) if d != seen[0]]
    if differing:
        raise ExchangeError(
            f"the {what} of replica(s) {', '.join(map(str, differing))} differ from those of replica 0; this is replica "
            f"{transport.rank}, with: {text[:300]}"
        )
    return [message[DIGEST_BYTES:].decode() for message in told]
