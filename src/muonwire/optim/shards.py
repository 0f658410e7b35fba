"""What carries shards between the processes of a replica: who owns a tensor, what travels together, and two all-to-alls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.transport.base import SingleReplica, Transport
from muonwire.transport.mesh import MeshTransport, mesh_transport
from muonwire.transport.shards import Cut, cut_of, is_sharded, local, place_of

# Every message of an all-to-all begins with so many bytes, of which the first is a status, and its tensors begin at multiples.
ALIGNED_BYTES = 16
# What is sent in one all-to-all, at most, by a process that owns tensors of this size; a larger tensor goes alone.
BUCKET_BYTES = 32 << 20
# Bits of the status: this process cannot go on; it has states that are not cut, which are told behind.
FAILED, OTHERS = 1, 2


def transport_for(
    groups: Sequence[Mapping[str, Any]], transport: Transport, *, streams: bool, unseen: bool
) -> Transport:
    """The transport that the groups' parameters need, which is the given one, but for sharded weights that train alone.

    Args:
        groups: all of the optimizer, of parameters.
        transport: that the optimizer was given.
        streams: whether fragments synchronize at different times, or messages travel while the replica goes on.
        unseen: whether weights move outside of steps, too, as where replicas synchronize, and the model is not known that sees it.

    Raises:
        UsageError: weights are sharded otherwise than along one axis of a mesh, or not as the transport has it, or steps are local
            and no model is given.
    """
    trained = [
        (name, param)
        for group in groups
        for name, param in zip(group["names"], group["params"], strict=True)
        if param.requires_grad
    ]
    sharded = [(name, param) for name, param in trained if is_sharded(param)]
    for name, param in trained:
        if is_sharded(param) is not bool(sharded) or (
            transport.shards_inside and transport.num_inside > 1 and not sharded
        ):
            raise UsageError(
                f"ChainOptimizer: {name} is whole on every process, where the transport or other parameters are sharded; "
                "call fully_shard on the whole model before building the optimizer, or give it frozen (requires_grad_(False))"
            )
    for name, param in sharded:
        _check_placement(name, param)
    if not sharded:
        return transport
    if streams:
        raise UsageError(
            "ChainOptimizer: fragments, delay and merge='arrival' are not there for sharded weights; use fragments=1 and delay=0"
        )
    if unseen:
        raise UsageError(
            "ChainOptimizer: local steps with sharded weights need the model, some of whose modules keep whole weights after an "
            "evaluation and must gather them anew; give model=model"
        )
    mesh: Any = sharded[0][1].device_mesh
    if type(transport) is SingleReplica:
        return mesh_transport(mesh)
    if not isinstance(transport, MeshTransport):
        raise UsageError(
            f"ChainOptimizer: {sharded[0][0]} is sharded (a DTensor), and the transport is a {type(transport).__name__}, whose "
            "replicas are single processes; make it with mesh_transport(mesh), of the mesh whose second axis shards the weights"
        )
    for name, param in sharded:
        ranks = param.device_mesh.mesh.flatten().tolist()
        if ranks != transport.ranks:
            raise UsageError(
                f"ChainOptimizer: {name} is sharded over the processes {ranks}, the replicas of the transport over "
                f"{transport.ranks}; call fully_shard with the second axis of the mesh that mesh_transport was given"
            )
    return transport


def _check_placement(name: str, param: Any) -> None:
    kinds = [type(placement).__name__ for placement in param.placements]
    if kinds != ["Shard"]:
        raise UsageError(
            f"ChainOptimizer: {name} is a DTensor with the placements {tuple(param.placements)}; weights may be sharded along one "
            "dimension over one axis of a mesh, as fully_shard(model, mesh=mesh['shard']) does it: no tensor parallelism beside "
            "it, and no second axis of copies, which mesh_transport's first axis stands for"
        )
    if param.device.type != param.device_mesh.device_type:
        raise UsageError(
            f"ChainOptimizer: {name} is on the {param.device.type}, its mesh of {param.device_mesh.device_type} devices; whole "
            "tensors are made on the mesh's devices, so weights have to be there, too: call fully_shard without CPUOffloadPolicy"
        )
    cut = cut_of(param)
    assert cut is not None
    if tuple(local(param).shape) != cut.shard_shape(place_of(param)):
        raise UsageError(
            f"ChainOptimizer: {name} of shape {tuple(param.shape)} has a shard of shape {tuple(local(param).shape)} on process "
            f"{place_of(param)}, where {cut.shard_shape(place_of(param))} is due; only chunks as fully_shard cuts them are known"
        )


@dataclass(frozen=True, kw_only=True)
class Item:
    """A tensor on its way between its shards and its owner.

    Args:
        cut: how it is cut.
        dtype: of the tensor.
        owner: the process that has it whole.
    """

    cut: Cut
    dtype: torch.dtype
    owner: int

    def num_bytes(self, place: int) -> int:
        """Of a process's shard, in a message."""
        return -(-self.cut.numel(place) * self.dtype.itemsize // ALIGNED_BYTES) * ALIGNED_BYTES


def owners(costs: Sequence[float], count: int) -> list[int]:
    """The owner of each tensor, by what it costs: the dearest first, each to whom has least so far.

    >>> owners([1, 4, 3, 1], 2)
    [1, 0, 1, 0]
    """
    loads, found = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[i] = loads.index(min(loads))
        loads[found[i]] += costs[i]
    return found


def buckets(sizes: Sequence[int], owner: Sequence[int], limit: int) -> list[list[int]]:
    """The tensors that travel together: of each owner so many, in their order, as have ``limit`` bytes together, and one at least.

    >>> buckets([4, 4, 4, 4], [0, 1, 0, 0], limit=8)
    [[0, 2, 1], [3]]
    """
    found: list[list[int]] = []
    for place in sorted(set(owner)):
        number, filled = 0, 0
        for i in (i for i, o in enumerate(owner) if o == place):
            if filled and filled + sizes[i] > limit:
                number, filled = number + 1, 0
            filled += sizes[i]
            if number == len(found):
                found.append([])
            found[number].append(i)
    return found


class Swapper:
    """Makes whole tensors of shards on their owners, and shards of whole ones, each by one all-to-all.

    Args:
        transport: whose replica it is.
    """

    def __init__(self, transport: MeshTransport) -> None:
        self._transport = transport
        self._place, self._count = transport.place, transport.num_inside

    def to_owners(
        self, items: Sequence[Item], shards: Sequence[Tensor], *, status: int = 0
    ) -> tuple[list[Tensor | None], int]:
        """The whole tensors that this process owns, None for the others, and the bits of all processes' statuses.

        Args:
            items: the same on all processes.
            shards: this process's, one an item.
            status: bits of this process's own.
        """
        place, others = self._place, self._others()
        by_owner = {j: [i for i, item in enumerate(items) if item.owner == j] for j in range(self._count)}
        mine = by_owner[place]
        arrived, status = self._swap(
            {j: [(items[i], shards[i]) for i in by_owner[j]] for j in others},
            {j: [items[i] for i in mine] for j in others},
            status,
            sender_place=lambda _: place,
            receiver_place=lambda j: j,
        )
        wholes: list[Tensor | None] = [None] * len(items)
        for k, i in enumerate(mine):
            item = items[i]
            whole = torch.empty(item.cut.shape, dtype=item.dtype, device=self._transport.device)
            item.cut.of(whole, place).copy_(shards[i])
            for j in others:
                item.cut.of(whole, j).copy_(arrived[j][k])
            wholes[i] = whole
        return wholes, status

    def to_shards(
        self, items: Sequence[Item], wholes: Sequence[Tensor | None], *, status: int = 0
    ) -> tuple[list[Tensor], int]:
        """This process's shards of all tensors, in memory of their own, and the bits of all processes' statuses.

        Args:
            items: the same on all processes.
            wholes: those that this process owns; None for the others.
            status: bits of this process's own.
        """
        place, others = self._place, self._others()
        by_owner = {j: [i for i, item in enumerate(items) if item.owner == j] for j in range(self._count)}
        own = [(items[i], whole) for i in by_owner[place] if (whole := wholes[i]) is not None]
        arrived, status = self._swap(
            {j: [(item, item.cut.of(whole, j)) for item, whole in own] for j in others},
            {j: [items[i] for i in by_owner[j]] for j in others},
            status,
            sender_place=lambda j: j,
            receiver_place=lambda _: place,
        )
        shards: list[Tensor] = [torch.empty(0)] * len(items)
        for i, whole in zip(by_owner[place], (whole for _, whole in own), strict=True):
            shards[i] = items[i].cut.of(whole, place).clone(memory_format=torch.contiguous_format)
        for j in others:
            for i, shard in zip(by_owner[j], arrived[j], strict=True):
                shards[i] = shard.clone()
        return shards, status

    def _others(self) -> list[int]:
        return [place for place in range(self._count) if place != self._place]

    def _swap(
        self,
        outgoing: Mapping[int, Sequence[tuple[Item, Tensor]]],
        incoming: Mapping[int, Sequence[Item]],
        status: int,
        *,
        sender_place: Callable[[int], int],
        receiver_place: Callable[[int], int],
    ) -> tuple[dict[int, list[Tensor]], int]:
        """Send tensors to each other process, and take what each sends: whose shards they are follows from the two functions."""
        if not outgoing:
            return {}, status
        sent, received = [0] * self._count, [0] * self._count
        for j, tensors in outgoing.items():
            sent[j] = ALIGNED_BYTES + sum(item.num_bytes(sender_place(j)) for item, _ in tensors)
            received[j] = ALIGNED_BYTES + sum(item.num_bytes(receiver_place(j)) for item in incoming[j])
        buffer = torch.empty(sum(sent), dtype=torch.uint8, device=self._transport.device)
        position = 0
        for j in range(self._count):
            if j in outgoing:
                buffer[position] = status
                position += ALIGNED_BYTES
                for item, tensor in outgoing[j]:
                    _piece(buffer, position, tensor.shape, item.dtype).copy_(tensor)
                    position += item.num_bytes(sender_place(j))
        arrived = self._transport.swap(buffer, sent, received)
        del buffer
        found: dict[int, list[Tensor]] = {}
        heads, position = [], 0
        for j in range(self._count):
            if j in incoming:
                heads.append(position)
                position += ALIGNED_BYTES
                found[j] = []
                for item in incoming[j]:
                    shape = item.cut.shard_shape(receiver_place(j))
                    found[j].append(_piece(arrived, position, shape, item.dtype))
                    position += item.num_bytes(receiver_place(j))
        for theirs in arrived[torch.tensor(heads, device=arrived.device)].tolist():
            status |= theirs
        return found, status


def _piece(buffer: Tensor, position: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in a buffer of bytes."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return buffer[position : position + num_bytes].view(dtype).view(torch.Size(shape))
