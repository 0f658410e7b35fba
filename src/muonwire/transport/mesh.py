"""A replica as a group of processes, each with a shard of every weight: a row of a device mesh.

Process s of replica r talks with process s of the other replicas, each of which holds the same shards, and with the other processes
of its replica, with which it makes whole tensors of shards.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from muonwire.errors import (
    DivergedReplicasError,
    ExchangeError,
    NonFiniteUpdateError,
    PayloadError,
    ReplicaLostError,
    StoppedError,
    UsageError,
)
from muonwire.transport.base import Flag, SingleReplica, Transport
from muonwire.transport.frames import FrameTransport
from muonwire.transport.header import SiteFailedError
from muonwire.transport.meter import Meter, Traffic
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.site_groups import site_transport
from muonwire.transport.sites import SiteTransport

Result = TypeVar("Result")
# The first byte of what processes of a replica tell each other: something, or the error that ends what they do together.
_GOOD, _BAD = b"+", b"!"
# Errors that are handed on as what they are; others become an ExchangeError.
_KINDS = {
    kind.__name__: kind
    for kind in (DivergedReplicasError, NonFiniteUpdateError, PayloadError, StoppedError, UsageError)
}


class MeshTransport(Transport):
    """The transport of a process whose replica is a group of processes with sharded weights; ``mesh_transport`` makes it.

    ``rank`` is the number of the replica and ``world_size`` that of the replicas. Operations go to the processes in the same place
    of the other replicas, and ``meter`` counts these: each process sends its share. ``inside_traffic`` is what went on inside the
    replica. An error of one process is raised by all of its replica (``as_one``, ``swap``); where a replica loses a process, the
    others tell the other replicas in place of their next operation.

    Args:
        between: with the processes in the same place of the other replicas.
        group: of the processes of this replica.
        device: of the weights.
    """

    shards_inside = True

    def __init__(self, between: Transport, group: dist.ProcessGroup, *, device: torch.device) -> None:
        self.between = between
        self.group = group
        self.device = device
        self.rank, self.world_size = between.rank, between.world_size
        self.members, self.meter = between.members, between.meter
        self.inside = ProcessGroupTransport(group)
        self.num_inside, self.place = self.inside.world_size, self.inside.rank
        self.ranks = dist.get_process_group_ranks(group)
        self.swaps = Meter()
        self._shared = Flag.NONE
        self._failure: ExchangeError | None = None
        self._everyone: Transport | None = None
        # One place to see for whom this process waits.
        self.between.waits = self.inside.waits = self.waits

    @property
    @override
    def everyone(self) -> Transport:
        if self._everyone is None:
            self._everyone = ProcessGroupTransport()
        return self._everyone

    @property
    @override
    def inside_traffic(self) -> Traffic:
        return self.inside.meter.total + self.swaps.total

    @override
    def called(self, rank: int) -> str:
        return self.between.called(rank)

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise: the groups of the mesh are not known where it would be unpickled.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "MeshTransport: it cannot be pickled, since its process groups are not known where it is unpickled; save the "
            "optimizer's state_dict(), and make mesh_transport(mesh) and the optimizer anew before loading it"
        )

    # With the other replicas

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        return self._act(lambda t: t.gather(payload, purpose=purpose, observers=observers))

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        return self._act(lambda t: t.all_to_all(payloads, purpose=purpose))

    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        return self._act(lambda t: t.mean(tensors, purpose=purpose))

    def _act(self, act: Callable[[Transport], Result]) -> Result:
        self._check_alive()
        between = self.between
        between.step, between.settings, between.series = self.step, self.settings, self.series
        # All processes of the replica must announce a stop in the same operation: those that all know of.
        own = self.requested & ~Flag.STOP
        between.requested, between.agreed = own | (self._shared & Flag.STOP), Flag.NONE
        try:
            result = act(between)
        except SiteFailedError as error:
            lost = "" if error.lost is None else f" its process {error.lost}"
            raise ReplicaLostError(
                f"replica {self.rank} lost replica {error.site} in step {self.step}, since that one "
                f"{'lost' + lost if lost else 'cannot go on'}; its own processes say why",
                rank=error.site,
            ) from error
        self.agreed |= between.agreed
        return result

    # Inside the replica

    @override
    def gather_inside(self, payload: bytes) -> list[bytes]:
        return self._tell(_GOOD + payload)

    @override
    def mean_inside(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self._at_home(lambda: self.inside.mean(tensors))

    def share(self, payload: bytes) -> list[bytes]:
        """``gather_inside``, and what one process has requested (``requested``) all of its replica request from then on."""
        told = self._tell(_GOOD + payload, flags=self.requested)
        self._shared = self.inside.agreed
        self.requested |= self._shared
        return told

    @override
    def as_one(self, act: Callable[[], Result]) -> Result:
        try:
            result = act()
        except Exception as error:
            self.tell(error)
            raise
        self.gather_inside(b"")
        return result

    def tell(self, error: Exception) -> None:
        """Tell the other processes of this replica an error, in place of what they gather next; nothing where all know it."""
        if not vars(error).get("told") and self._failure is None:
            described = {
                "kind": type(error).__name__,
                "text": str(error),
                "rank": getattr(error, "rank", None),
                "place": self.place,
            }
            vars(error)["told"] = True
            self._tell(_BAD + json.dumps(described).encode())

    def _tell(self, message: bytes, flags: Flag = Flag.NONE) -> list[bytes]:
        told = self._at_home(lambda: self.inside.gather(message, purpose="control"), flags=flags)
        if message[:1] != _BAD:
            for theirs in told:
                if theirs[:1] == _BAD:
                    _raise_described(json.loads(theirs[1:]), rank=self.rank)
        return [theirs[1:] for theirs in told]

    def swap(self, outgoing: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """What every process of this replica gives to this one, one behind the other: one all-to-all.

        Args:
            outgoing: (bytes,) uint8 on ``device``: what this process gives to each, in their order.
            sent: bytes to each.
            received: bytes from each.

        Raises:
            ReplicaLostError: a process of the replica is gone.
        """
        incoming = outgoing.new_empty(sum(received))

        def exchange() -> None:
            try:
                dist.all_to_all_single(incoming, outgoing, [*received], [*sent], group=self.group)
            except RuntimeError as error:
                raise ReplicaLostError(
                    f"it lost a process in an all-to-all of shards: {str(error).splitlines()[0][:200]}"
                ) from error

        self._at_home(exchange)
        own = outgoing.numel()
        traffic = Traffic(sent_bytes=own, egress_bytes=own, received_bytes=incoming.numel(), num_messages=1)
        self.swaps.add("update", traffic)
        return incoming

    def _at_home(self, act: Callable[[], Result], flags: Flag = Flag.NONE) -> Result:
        """Something inside the replica; where it fails, the other replicas are told, and this transport ends."""
        self._check_alive()
        inside = self.inside
        inside.step, inside.settings = self.step, self.settings
        inside.requested, inside.agreed = flags, Flag.NONE
        try:
            return act()
        except ExchangeError as error:
            place = error.rank if isinstance(error, ReplicaLostError) else None
            text = (
                f"replica {self.rank}, whose processes {', '.join(map(str, self.ranks))} are counted from 0 here, cannot go on in "
                f"step {self.step}: {error}"
            )
            lost = isinstance(error, ReplicaLostError)
            self._failure = ReplicaLostError(text, rank=self.rank) if lost else type(error)(text)
            vars(self._failure)["told"] = True
            if isinstance(self.between, FrameTransport):
                self.between.report(lost=place)
            raise self._failure from error

    @property
    def failed(self) -> bool:
        """Whether the replica has lost a process, after which every operation fails."""
        return self._failure is not None

    def _check_alive(self) -> None:
        if self._failure is not None:
            text = f"this transport failed before and cannot be used again: {self._failure}"
            if isinstance(self._failure, ReplicaLostError):
                raise ReplicaLostError(text, rank=self._failure.rank)
            raise ExchangeError(text)


def _raise_described(error: dict[str, Any], *, rank: int) -> NoReturn:
    """Raise the error of another process of the replica."""
    text = f"process {error['place']} of replica {rank}: {error['text']}"
    if error["kind"] in ("ReplicaLostError", "SiteFailedError"):
        raised: Exception = ReplicaLostError(text, rank=error["rank"])
    elif error["kind"] in _KINDS:
        raised = _KINDS[error["kind"]](text)
    else:
        kind = "" if error["kind"] == "ExchangeError" else f" ({error['kind']})"
        raised = ExchangeError(text + kind)
    vars(raised)["told"] = True
    raise raised


def mesh_transport(mesh: DeviceMesh, *, copies: bool = False) -> MeshTransport | SiteTransport:
    """The transport between replicas that are groups of processes, out of the device mesh that names them.

    All processes call it together. The first axis of the mesh is that of the replicas; the second one that of the processes of a
    replica. What these hold is what the loop makes of them: with ``fully_shard(model, mesh=mesh["shard"])`` a shard of each weight;
    with ``DistributedDataParallel(model, process_group=mesh["copy"].get_group())`` a copy, which ``copies`` says.

    Args:
        mesh: of two axes, or of one: a single replica of sharded weights.
        copies: whether every process of a replica holds the whole model, with gradients that the loop averages. Default: False,
            shards.

    Returns:
        a MeshTransport; with ``copies`` a SiteTransport whose sites are the replicas.

    Raises:
        UsageError: the mesh has more axes, or not all processes with ``copies``, or one replica of copies.
    """
    if mesh.ndim > 2:
        raise UsageError(
            f"mesh_transport: the mesh has {mesh.ndim} axes ({', '.join(mesh.mesh_dim_names or ())}); give the two of the replicas "
            'and of the processes in a replica, such as mesh["replica", "shard"]'
        )
    if copies:
        if mesh.ndim != 2 or mesh.mesh.flatten().tolist() != list(range(dist.get_world_size())):
            raise UsageError(
                f"mesh_transport: copies=True with the mesh {mesh.mesh.tolist()} of {dist.get_world_size()} processes; wanted is a "
                "mesh of two axes with all processes, in order, as init_device_mesh makes it"
            )
        return site_transport(replicas_per_site=mesh.size(1), averages=False)
    between: Transport = SingleReplica()
    if mesh.ndim == 2 and mesh.size(0) > 1:
        between = ProcessGroupTransport(mesh.get_group(0))
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device.type).current_device())
    return MeshTransport(between, mesh.get_group(mesh.ndim - 1), device=device)
