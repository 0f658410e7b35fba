"""Transport over a torch.distributed process group.

gloo ends the process where a message is longer than its receiver's buffer, and a replica that is out of step may send a message of
any length. So with gloo a frame of up to ``FIRST_BYTES`` travels under tag 0, into a buffer of that size. Of a longer frame only
the header travels that way, and the body at the same time under a tag that follows from its length: a body of another length
finds no buffer with its tag, and waits. Other backends have no tags: there headers travel first, and bodies once the headers agree.
"""

import re
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.transport.frames import Accept, FrameTransport
from muonwire.transport.rendezvous import address_of

FIRST_BYTES = 1 << 20
_FIRST_TAG = 0
_TAGS = (1 << 31) - 1


class _Message(NamedTuple):
    """A message on its way, and the buffer that must outlive it."""

    peer: int
    buffer: Tensor
    work: dist.Work


class ProcessGroupTransport(FrameTransport):
    """Transport between the replicas of a process group.

    A transport of the default group can be pickled; it is made anew with the default group where it is unpickled.

    Args:
        group: the process group; default: the world. ``torch.distributed`` must be initialized.
        device: where messages are kept while they travel. Default: the CPU for gloo, the current GPU for nccl.

    Raises:
        UsageError: ``torch.distributed`` is not initialized.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, device: torch.device | str | None = None
    ) -> None:
        if not dist.is_initialized():
            raise UsageError(
                "ProcessGroupTransport: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first, or use SingleReplica for one replica"
            )
        self.group = group
        on_gpu = dist.get_backend(group) == "nccl"
        super().__init__(
            rank=dist.get_rank(group),
            world_size=dist.get_world_size(group),
            device=torch.device(device) if device else torch.device("cuda" if on_gpu else "cpu"),
        )
        self._has_tags = self.device.type == "cpu"
        self._firsts: dict[int, Tensor] = {}
        # Messages of a failed operation: gloo may still write to their buffers, which must outlive it.
        self._left: list[_Message] = []
        self._began_s = 0.0

    @override
    def called(self, rank: int) -> str:
        address = address_of(rank if self.group is None else dist.get_global_rank(self.group, rank))
        return f"replica {rank} ({address})" if address else f"replica {rank}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a transport of the default group; other groups are not known where it is unpickled.

        Raises:
            UsageError: the transport is of another group.
        """
        if self.group is not None and self.group is not dist.group.WORLD:
            raise UsageError(
                "ProcessGroupTransport: a transport of a group other than the default one cannot be pickled, since the group "
                "is not known where it is unpickled; save the optimizer's state_dict(), and make ProcessGroupTransport(group) and "
                "the optimizer anew before loading it"
            )
        return _of_default_group, (self.device.type,)

    @override
    def carry(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        if self._has_tags:
            self._carry_at_once(header, outgoing, incoming, accept)
        else:
            self._carry_headers_first(header, outgoing, incoming, accept)

    def _carry_at_once(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        room = FIRST_BYTES - len(header) if header else 0
        firsts_in = {peer: self._first_buffer(peer) for peer in incoming} if header else {}
        firsts_out = self._firsts_of(header, outgoing, room) if header else {}
        alone_in = {peer: body for peer, body in incoming.items() if body.numel() > room}
        alone_out = {peer: body for peer, body in outgoing.items() if body.numel() > room}
        left: list[_Message] = []
        self._left = left
        self._began_s = time.perf_counter()
        for peer, first in firsts_in.items():
            # No header starts with zero: what is still zero has not come.
            first.numpy()[0] = 0
            self._start(left, False, peer, first, _FIRST_TAG)
        for peer, first in firsts_out.items():
            self._start(left, True, peer, first, _FIRST_TAG)
        num_firsts = len(left)
        for peer, body in alone_in.items():
            self._start(left, False, peer, body, _tag(body))
        for peer, body in alone_out.items():
            self._start(left, True, peer, body, _tag(body))
        # Wait for the sends too: this replica's header must have left before it may raise and end.
        for message in left[:num_firsts]:
            self._wait(message)
        if header:
            accept({peer: first[: len(header)].numpy().tobytes() for peer, first in firsts_in.items()})
            for peer, body in incoming.items():
                if peer not in alone_in:
                    body.copy_(firsts_in[peer][len(header) : len(header) + body.numel()])
        for message in left[num_firsts:]:
            self._wait(message)
        self._left = []

    def _first_buffer(self, peer: int) -> Tensor:
        if peer not in self._firsts:
            self._firsts[peer] = self._empty(FIRST_BYTES)
        return self._firsts[peer]

    def _firsts_of(self, header: bytes, outgoing: Mapping[int, Tensor], room: int) -> dict[int, Tensor]:
        # A body that goes to several peers is one tensor, and so is the message.
        made: dict[int, Tensor] = {}
        for body in outgoing.values():
            if id(body) not in made:
                first = bytearray(header)
                if body.numel() <= room:
                    first += body.numpy().data
                made[id(body)] = torch.frombuffer(first, dtype=torch.uint8)
        return {peer: made[id(body)] for peer, body in outgoing.items()}

    def _carry_headers_first(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        if header:
            own = self._to_wire(header)
            headers = {peer: self._empty(len(header)) for peer in incoming}
            self._batch(dict.fromkeys(outgoing, own), headers)
            accept({peer: message.cpu().numpy().tobytes() for peer, message in headers.items()})
        self._batch(
            {peer: body for peer, body in outgoing.items() if body.numel()},
            {peer: body for peer, body in incoming.items() if body.numel()},
        )

    def _batch(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        peers = [*incoming, *outgoing]
        if not peers:
            return
        ops = [dist.P2POp(dist.irecv, m, group=self.group, group_peer=peer) for peer, m in incoming.items()]
        ops += [dist.P2POp(dist.isend, m, group=self.group, group_peer=peer) for peer, m in outgoing.items()]
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise self._lost(None, error) from error
        for i, work in enumerate(works):
            # nccl returns one work for the whole batch, from which the failed message cannot be told.
            try:
                work.wait()
            except RuntimeError as error:
                raise self._lost(peers[i] if len(works) == len(ops) else None, error) from error

    def _start(self, left: list[_Message], sends: bool, peer: int, buffer: Tensor, tag: int) -> None:
        try:
            if sends:
                work = dist.isend(buffer, group=self.group, group_dst=peer, tag=tag)
            else:
                work = dist.irecv(buffer, group=self.group, group_src=peer, tag=tag)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        assert work is not None
        left.append(_Message(peer, buffer, work))

    def _wait(self, message: _Message) -> None:
        peer = message.peer
        try:
            with self.waits.on(
                partial(self._missing, peer),
                peer=self.members[peer],
                answer=lambda: f"{self.called(peer)} answered",
                since_s=self._began_s,
            ):
                message.work.wait()
        except RuntimeError as error:
            raise self._lost(peer, error) from error

    def _missing(self, peer: int) -> str:
        """Whose messages have not come: that of ``peer``, and of others where it can be seen."""
        missing = [other for other, first in self._firsts.items() if other == peer or first[0] == 0]
        return " and ".join(map(self.called, missing or [peer]))

    def _lost(self, rank: int | None, error: RuntimeError) -> ReplicaLostError:
        who = "a replica" if rank is None else self.called(rank)
        own = f"replica {self.rank} of {self.world_size}"
        if self._has_tags and "Timed out" in str(error):
            waited_s = time.perf_counter() - self._began_s
            return ReplicaLostError(
                f"{own} waited {waited_s:.0f} s for {who} in step {self.step} and got no answer: that one stands still, or its "
                "machine or the link is down. So long a silent replica is waited for, by the process group's timeout (--timeout-s "
                "of muonwire train)",
                rank=rank,
            )
        # gloo begins with the place in its source, and ends with advice for its own developers.
        text = re.sub(r"^\[[^]]*\] | This is typically caused.*", "", str(error).splitlines()[0])[:200]
        return ReplicaLostError(f"{own} lost its connection to {who} in step {self.step}: {text}", rank=rank)


def _of_default_group(device: str) -> ProcessGroupTransport:
    return ProcessGroupTransport(device=device)


def _tag(body: Tensor) -> int:
    """The tag of a body that travels alone; bodies up to 2 GiB with different lengths have different tags."""
    return 1 + body.numel() % (_TAGS - 1)
