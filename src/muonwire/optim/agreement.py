"""What replicas compare with each other before they exchange: groups, weights, buffers, and how far each has stepped."""

import re
import struct
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonwire.errors import DivergedReplicasError, ExchangeError
from muonwire.optim import saved
from muonwire.optim.groups import description as describe_groups
from muonwire.optim.kept import copy_in
from muonwire.polar import find_processor
from muonwire.polar.processor import slowest
from muonwire.transport.base import Flag, Transport
from muonwire.transport.digest import DIGEST_BYTES, check_agreement, check_replicas, digest_all
from muonwire.transport.shards import local

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer

_OWN = struct.Struct(f"<I{DIGEST_BYTES}s")
UNCHANGED = bytes(DIGEST_BYTES)


def floating_buffers(model: nn.Module | None, *, exclude: Sequence[str]) -> list[tuple[str, Tensor]]:
    """The buffers that are averaged over the replicas, such as BatchNorm's running statistics, each once."""
    if model is None:
        return []
    # Buffers outside the state dict are constants, such as the frequencies of rotary positions.
    kept = model.state_dict(keep_vars=True)
    return [
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name in kept
        and buffer.is_floating_point()
        and not any(re.search(pattern, name) for pattern in exclude)
    ]


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """The small message by which replicas compare themselves before a synchronization.

    Args:
        alone: local steps since the last synchronization.
        edits: digest of the weights that were loaded or edited since then; zeros where none were.
        buffers: digests of the floating buffers, in the model's order.
        spell: what this replica tells of the time that it waits; see Adapting. Default: nothing.
    """

    alone: int
    edits: bytes
    buffers: Sequence[bytes]
    spell: bytes = b""

    @staticmethod
    def estimate_bytes(num_buffers: int) -> int:
        """Bytes of the message."""
        return _OWN.size + num_buffers * DIGEST_BYTES

    def exchange(self, transport: Transport) -> "Shaken":
        """Compare with the other replicas.

        Raises:
            DivergedReplicasError: weights were changed from outside, and not alike on all replicas.
            ExchangeError: the replicas are not equally far from their last synchronization, or have other buffers.
        """
        own = _OWN.pack(self.alone, self.edits) + self.spell + b"".join(self.buffers)
        messages = transport.gather(own, purpose="agreement")
        alone, edits = zip(*(_OWN.unpack_from(message) for message in messages), strict=True)
        if len(set(alone)) > 1 or len({len(message) for message in messages}) > 1:
            raise ExchangeError(
                f"replicas are out of step: their local steps since the last synchronization are {', '.join(map(str, alone))} by "
                "rank; every replica must call step() and synchronize() equally often"
            )
        if len(set(edits)) > 1:
            edited = [str(rank) for rank, e in enumerate(edits) if e != UNCHANGED]
            raise DivergedReplicasError(
                f"weights were changed from outside since the last synchronization (loaded or edited), on replica(s) "
                f"{', '.join(edited)} of {len(edits)}, and not alike on all; load the same weights on every replica, or build the "
                'optimizer with start="broadcast" after loading'
            )
        begin = _OWN.size + len(self.spell)
        differing = [
            i
            for i in range(len(self.buffers))
            if len({m[begin + i * DIGEST_BYTES :][:DIGEST_BYTES] for m in messages}) > 1
        ]
        return Shaken(differing=differing, spells=[m[_OWN.size : begin] for m in messages])


@dataclass(frozen=True, kw_only=True)
class Shaken:
    """What a handshake found.

    Args:
        differing: the indices of the buffers that differ.
        spells: what each replica told of its waiting, in rank order.
    """

    differing: Sequence[int] = ()
    spells: Sequence[bytes] = ()


def buffer_means(
    buffers: Sequence[tuple[str, Tensor]], differing: Sequence[int], transport: Transport
) -> list[tuple[Tensor, Tensor]]:
    """The buffers that differ, each with its mean over the replicas."""
    chosen = [buffers[i][1] for i in differing]
    return list(zip(chosen, transport.mean(chosen), strict=True)) if chosen else []


class Agreement:
    """Whether replicas have found that they train the same model with the same chains, from the same weights."""

    def __init__(self) -> None:
        self.reached = False
        self.edits = UNCHANGED
        # The floating buffers when the optimizer was built; the first gradient's forward pass may have changed them since.
        self.at_build: dict[str, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"reached": False, "edits": self.edits, "at_build": None}

    def add_edits(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Add weights that were changed from outside to the digest that the next handshake compares."""
        before = torch.frombuffer(bytearray(self.edits), dtype=torch.uint8)
        self.edits = digest_all([("edits before", before), *named])

    def forget_edits(self) -> None:
        """Start a new digest, after all replicas were found to be changed alike."""
        self.edits = UNCHANGED

    def reach(
        self, transport: Transport, *, description: str, processor: str, machine: str, multiplies: bool
    ) -> str:
        """Make sure that all replicas have the same groups, and return the slowest of their processor classes.

        Args:
            transport: between the replicas.
            description: of the groups.
            processor: class of this replica's.
            machine: what of the class it is, where that is known, as the name of a GPU.
            multiplies: whether what all make of the same messages is a product of matrices.

        Raises:
            ExchangeError: the descriptions differ.
        """
        notes = check_agreement(
            description, transport, what="optimizer groups", note=f"{processor} {machine}".strip()
        )
        agreed = slowest([note.partition(" ")[0] for note in notes]).name
        if multiplies and len(set(notes)) > 1:
            warnings.warn(
                f"ChainOptimizer: the replicas' processors are of different classes ({', '.join(notes)} by rank); polar factors "
                f"follow {agreed} on all of them. Products of different machines may round differently all the same: compare "
                "the weights with check_replicas, or use a recipe with local steps and a codec without dct, or "
                "approach_b(server=True)",
                stacklevel=4,
            )
        self.reached = True
        return agreed

    def check(self, named: Sequence[tuple[str, Tensor]], transport: Transport) -> None:
        """Make sure that all replicas hold the same weights, and that they had the same buffers when they were built.

        Raises:
            DivergedReplicasError: names the first that differs.
        """
        if transport.world_size == 1:
            return
        self.reached = False
        try:
            check_replicas([*named, *(self.at_build or {}).items()], transport, purpose="control")
        except DivergedReplicasError as error:
            raise DivergedReplicasError(
                f"the replicas do not start from the same weights and buffers: {error}. Build the model with the same seed on all, "
                'load the same checkpoint, or give the optimizer start="broadcast"'
            ) from error
        self.reached, self.at_build = True, None


@torch.no_grad()
def begin(optimizer: "ChainOptimizer", model: nn.Module | None) -> None:
    """Finish the construction of an optimizer: take replica 0's weights and buffers if ``start`` asks for it; note the buffers."""
    transport, lifecycle = optimizer.transport, optimizer.lifecycle
    if transport.world_size == 1:
        return
    buffers = {} if model is None else dict(model.named_buffers())
    if lifecycle.start == "broadcast":
        params = optimizer.trained()
        agree_on_groups(optimizer, params, transport)
        transport.as_one(lambda: _take_from_first([*params, *buffers.values()], transport))
        copy_in(params, optimizer.state)
        optimizer.record_weights()
        optimizer.agreement.reached = False
    optimizer.agreement.at_build = {
        f"buffer {name!r}": buffer.detach().clone()
        for name, buffer in buffers.items()
        if not any(re.search(pattern, name) for pattern in lifecycle.exclude_buffers)
    }


def _take_from_first(tensors: Sequence[Tensor], transport: Transport) -> None:
    """Take the values of replica 0; those of the shards in this place where weights are sharded."""
    for tensor in map(local, tensors):
        own = tensor.detach().cpu().contiguous()
        payload = own.reshape(-1).view(torch.uint8).numpy().tobytes() if transport.rank == 0 else b""
        if not transport.shards_inside:
            payload = transport.gather_inside(payload)[0]
        sent = transport.gather(payload, purpose="control")[0]
        if transport.everyone.rank != 0 and tensor.numel():
            received = torch.frombuffer(bytearray(sent), dtype=torch.uint8).view(tensor.dtype)
            tensor.copy_(received.view(tensor.shape))


def ensure_agreement(optimizer: "ChainOptimizer", params: Sequence[Tensor]) -> None:
    """Bring the kept copies up to the weights, and before the first exchange compare groups and weights with all replicas."""
    streaming = optimizer.streaming
    if optimizer.changes.converted(params):
        if streaming is not None:
            streaming.land()
        for param in params:
            saved.convert(optimizer.state[param], param, keeps_master=optimizer.keeps_master(param))
    if optimizer.changes.edited(params, optimizer.state):
        if streaming is not None:
            streaming.abandon()
        copy_in(params, optimizer.state)
        optimizer.record_weights()
        optimizer.agreement.at_build = None
        if optimizer.agreement.reached and optimizer.transport.world_size > 1:
            if optimizer.local is None:
                optimizer.transport.requested |= Flag.CHANGED
            else:
                optimizer.agreement.add_edits([(name, local(weight)) for name, weight in optimizer.shared()])
    if optimizer.agreement.reached:
        return
    with nullcontext(optimizer.transport) if streaming is None else streaming.direct() as transport:
        agree_on_groups(optimizer, params, transport)
        optimizer.agreement.check(optimizer.shared(), transport)
    if streaming is not None:
        # Once it is known that the others have such a channel, too.
        streaming.open()


def agree_on_groups(optimizer: "ChainOptimizer", params: Sequence[Tensor], transport: Transport) -> None:
    """Compare the groups with all replicas, and let polar factors follow the slowest of their processors.

    Raises:
        ExchangeError: the groups differ.
    """
    device = params[0].device if params else torch.device("cpu")
    own = find_processor(device)
    talking = list(optimizer.outer.values()) if optimizer.local is not None else optimizer.chains
    key = "processor" if optimizer.local is None else "outer_processor"
    settings = f"{optimizer.local} {optimizer.look_ahead} step {optimizer.num_steps}"
    note = next((g[key] for g in optimizer.param_groups if g[key] is not None), own.name)
    # The replicas of a site round alike in their local steps, too.
    own, at_home = (
        slowest([name.decode() for name in transport.gather_inside(text.encode())])
        for text in (own.name, note)
    )
    agreed = transport.as_one(
        lambda: optimizer.agreement.reach(
            transport,
            description=f"{settings}: {describe_groups(optimizer.param_groups)}",
            processor=at_home.name,
            machine=_machine(device),
            multiplies=any(members.multiplies for members in talking),
        )
    )
    for group in optimizer.param_groups:
        group[key] = agreed
        # Local steps follow the processor of this replica, the one that they began on.
        group["processor"] = group["processor"] or own.name


def _machine(device: torch.device) -> str:
    """The name of a GPU, of which two of one class may sum in another order; of a CPU the class says enough."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
