"""A digest of the weights, compared between replicas: the proof that they are bit-identical."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from muonwire.errors import DivergedReplicasError, ExchangeError, UsageError
from muonwire.transport.base import Transport
from muonwire.transport.shards import is_sharded, local, reshard

DIGEST_BYTES = 8
Named = Iterable[tuple[str, Tensor]]


def digest(tensor: Tensor) -> bytes:
    """Eight bytes of BLAKE2b over the tensor's own bits: equal bits give equal digests, -0.0 and 0.0 differ.

    Args:
        tensor: of any shape, strides, device and dtype that has bits of its own. Its shape and dtype do not count.

    >>> digest(torch.zeros(2, 3)).hex() == digest(torch.zeros(6)).hex()
    True

    Raises:
        UsageError: the tensor has no data here (meta), or only a part of it (DTensor), or is sparse or quantized.
    """
    return _digest(tensor, "the tensor")


def _digest(tensor: Tensor, which: str) -> bytes:
    if is_sharded(tensor):
        raise UsageError(
            f"digest: {which} is a DTensor, of which this process holds a part; take full_tensor(), or compare replicas through "
            "mesh_transport"
        )
    if tensor.is_meta:
        raise UsageError(
            f"digest: {which} is on the meta device and has no data; give it some first (to_empty, load)"
        )
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise UsageError(f"digest: {which} is {kind}; take a dense tensor of it (to_dense, dequantize)")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data = plain.view(-1).view(torch.uint8).numpy()
    return _hash(data.data)


def digest_all(what: nn.Module | Named) -> bytes:
    """Eight bytes of BLAKE2b over the digests of all tensors in their order; names do not count.

    Args:
        what: a model, of which the parameters and the buffers count, or names and tensors.

    >>> weight, bias = torch.ones(2, 2), torch.zeros(2)
    >>> digest_all([("weight", weight), ("bias", bias)]) == digest_all([("bias", bias), ("weight", weight)])
    False

    Raises:
        UsageError: see digest; names the tensor.
    """
    return _hash(b"".join(_digest(tensor, text) for text, tensor in _described(what)))


def check_replicas(what: nn.Module | Named, transport: Transport, *, purpose: str = "digest") -> str:
    """Compare the weights of all replicas, and return their common digest (``digest_all``) as hexadecimal text.

    Costs 8 bytes a replica where they agree, and 16 bytes a tensor more where they do not. Where a replica is a group of processes
    with sharded weights (MeshTransport), each compares its shards, and the digest is one over those of its processes.

    Args:
        what: a model, of which the parameters and the buffers (persistent or not) are compared, or names and tensors. A name that
            begins with "buffer " stands in messages as it is.
        transport: between the replicas to compare.
        purpose: under which the meter counts it. Default: "digest".

    >>> from muonwire.transport import SingleReplica
    >>> check_replicas([("weight", torch.zeros(2))], SingleReplica()) == digest_all([("weight", torch.zeros(2))]).hex()
    True

    Raises:
        DivergedReplicasError: names the first tensor that differs, and the ranks that differ from rank 0 in it; or says that the
            replicas do not hold the same tensors. On all replicas.
        UsageError: a tensor has no digest (see digest); raised before anything is sent.
    """
    if isinstance(what, nn.Module):
        reshard(what)
    named = _described(what)
    if not transport.shards_inside:
        return _compare(named, transport, purpose=purpose).hex()
    shards = [(text, local(tensor)) for text, tensor in named]
    own = transport.as_one(lambda: _compare(shards, transport, purpose=purpose))
    return _hash(b"".join(transport.gather_inside(own))).hex()


def _compare(named: Sequence[tuple[str, Tensor]], transport: Transport, *, purpose: str) -> bytes:
    """Compare the tensors of all replicas, which are called so in messages; returns their common digest."""
    whole = _hash(b"".join(_digest(tensor, text) for text, tensor in named))
    # Names, dtypes and shapes are compared in the same eight bytes.
    layouts = [_hash(f"{text} {tensor.dtype} {tuple(tensor.shape)}".encode()) for text, tensor in named]
    if len(set(transport.gather(_hash(b"".join([*layouts, whole])), purpose=purpose))) == 1:
        return whole
    digests = [_digest(tensor, text) for text, tensor in named]
    everyone = transport.gather(b"".join([*layouts, *digests]), purpose=purpose)
    _check_layouts(everyone, [text for text, _ in named], transport)
    for i, (text, _) in enumerate(named):
        seen = [_piece(message, len(named) + i) for message in everyone]
        differing = _differing(seen)
        if differing:
            raise DivergedReplicasError(
                f"replicas diverged: {text} is the first of {len(named)} that differs; on rank(s) "
                f"{', '.join(map(str, differing))} its digest is not that of rank 0 ({seen[0].hex()}). Look for "
                "arithmetic whose rounding depends on the machine, or a parameter that one replica changes alone"
            )
    raise DivergedReplicasError(
        "replicas diverged: a tensor was changed on some replica while they were compared"
    )


def _described(what: nn.Module | Named) -> list[tuple[str, Tensor]]:
    if isinstance(what, nn.Module):
        parameters = [(f"parameter {name!r}", tensor) for name, tensor in what.named_parameters()]
        return parameters + [(f"buffer {name!r}", tensor) for name, tensor in what.named_buffers()]
    return [(name if name.startswith("buffer ") else f"parameter {name!r}", tensor) for name, tensor in what]


def _check_layouts(everyone: Sequence[bytes], texts: Sequence[str], transport: Transport) -> None:
    numbers = [len(message) // (2 * DIGEST_BYTES) for message in everyone]
    if len(set(numbers)) > 1:
        counts = ", ".join(f"replica {rank} has {number}" for rank, number in enumerate(numbers))
        raise DivergedReplicasError(
            f"replicas differ in the number of their tensors: {counts}; build the same model on all of them"
        )
    for i, text in enumerate(texts):
        differing = _differing([_piece(message, i) for message in everyone])
        if differing:
            raise DivergedReplicasError(
                f"replicas differ in the names, dtypes or shapes of their tensors: number {i + 1} of {len(texts)}, on this rank "
                f"{transport.rank} {text}, is another on rank(s) {', '.join(map(str, differing))} than on rank 0; build "
                "the same model on all of them"
            )


def _piece(message: bytes, index: int) -> bytes:
    return message[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


def _differing(seen: Sequence[bytes]) -> list[int]:
    return [rank for rank, d in enumerate(seen) if d != seen[0]]


def _hash(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def check_agreement(text: str, transport: Transport, *, what: str, note: str = "") -> list[str]:
    """Make sure that all replicas have the same ``text``, at 8 bytes a replica, and exchange a note in the same message.

    Args:
        text: what must be the same.
        transport: between the replicas.
        what: what the text describes, for the message.
        note: a text that may differ. Default: none.

    Returns:
        the replicas' notes, in rank order.

    Raises:
        ExchangeError: names the replicas whose ``what`` is not that of replica 0.
    """
    own = _hash(text.encode())
    messages = transport.gather(own + note.encode(), purpose="control")
    differing = _differing([message[:DIGEST_BYTES] for message in messages])
    if differing:
        raise ExchangeError(
            f"the {what} of replica(s) {', '.join(map(str, differing))} differ from those of replica 0; this is replica "
            f"{transport.rank}, with: {text[:300]}"
        )
    return [message[DIGEST_BYTES:].decode() for message in messages]
