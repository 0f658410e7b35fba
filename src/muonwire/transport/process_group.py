"""Transport over a torch.distributed process group.

gloo ends the process where a message is longer than its receiver's buffer, and a replica that is out of step may send a message of
any length. So with gloo a frame of up to ``FIRST_BYTES`` travels under a tag of its own, into a buffer of that size that waits for
it already (``ahead.py``). Of a longer frame only the header travels that way, and the body at the same time under a tag that
follows from its length: a body of another length finds no buffer with its tag, and waits. Other backends have no tags: there
headers travel first, and bodies once the headers agree.

With a secret, messages travel as streams under tags that only its holders can make (``sealed.py``).
"""

import logging
import re
import time
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from itertools import dropwhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from muonwire.errors import ExchangeError, ReplicaLostError, UsageError
from muonwire.transport.ahead import Ahead, InFlight
from muonwire.transport.channel import Channel
from muonwire.transport.frames import Accept, FrameTransport
from muonwire.transport.message import Refusal
from muonwire.transport.meter import Traffic
from muonwire.transport.rendezvous import EXCHANGE_TIMEOUT_S, address_of
from muonwire.transport.sealed import SealedLinks
from muonwire.transport.secret import Secret
from muonwire.transport.stream import sealed_bytes
from muonwire.transport.waiting import Text, Wait

FIRST_BYTES = 1 << 20
_TAGS = (1 << 31) - 1
_SEALED_TAG, _FIRST_TAG = _TAGS, _TAGS - 1
_AT_ONCE = timedelta(milliseconds=1)

_log = logging.getLogger(__name__)
# The links of each sealed group: all its transports share them, since a stream goes on from one to the next.
_sealed: "WeakKeyDictionary[dist.ProcessGroup, SealedLinks]" = WeakKeyDictionary()
# What waits for the next messages of each group's replicas: whichever of its transports is next takes them.
_ahead: "WeakKeyDictionary[dist.ProcessGroup, Ahead]" = WeakKeyDictionary()
# The transports of the channels beside each group.
_channels: "WeakKeyDictionary[dist.ProcessGroup, list[ProcessGroupTransport]]" = WeakKeyDictionary()


class ProcessGroupTransport(FrameTransport):
    """Transport between the replicas of a process group.

    A transport of the default group can be pickled; it is made anew with the default group where it is unpickled.

    With a secret, the group is sealed: from then on every message of its transports, of this one and of later ones, carries a tag,
    and what is altered, replayed or foreign is counted in ``refused`` and sent again. Sealing is for gloo, on the CPU.

    Args:
        group: the process group; default: the world. ``torch.distributed`` must be initialized.
        device: where messages are kept while they travel. Default: the CPU for gloo, the current GPU for nccl.
        secret: of all replicas of the run. Default: that of the group, if it is sealed already.
        run: name of the run that the tags stand for; the same on all replicas. Default: none.
        timeout_s: how long a sealed operation is waited for. Default: 600.

    Raises:
        UsageError: ``torch.distributed`` is not initialized, the backend is not gloo though there is a secret, or the group is
            sealed with another one.
    """

    group: dist.ProcessGroup | None = None

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        secret: Secret | None = None,
        run: str = "",
        timeout_s: float = EXCHANGE_TIMEOUT_S,
    ) -> None:
        if not dist.is_initialized():
            raise UsageError(
                "ProcessGroupTransport: torch.distributed is not initialized; call "
                "torch.distributed.init_process_group first, or use SingleReplica for one replica"
            )
        self.group = group
        on_gpu = dist.get_backend(group) == "nccl"
        self._links: SealedLinks | None
        self._ahead: Ahead
        self._prepare(
            rank=dist.get_rank(group),
            world_size=dist.get_world_size(group),
            device=torch.device(device) if device else torch.device("cuda" if on_gpu else "cpu"),
        )
        self._timeout_s = timeout_s
        self._links = _sealed.get(self._group)
        self._ahead = _ahead.setdefault(self._group, self._ahead)
        if secret is not None:
            self._seal(secret, run)

    def _prepare(self, *, rank: int, world_size: int, device: torch.device) -> None:
        """Begin with the first message between these replicas."""
        super().__init__(rank=rank, world_size=world_size, device=device)
        self._has_tags = self.device.type == "cpu"
        self._ahead = self._none_ahead()
        # Messages of a failed operation: gloo may still write to their buffers, which must outlive it.
        self._left: list[InFlight] = []
        self._began_s = 0.0
        self._links = None
        self._refused_before: Counter[str] = Counter()
        # How long a message is waited for. Default: as the group has it.
        self._limit: timedelta | None = None

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

    @property
    def refused(self) -> dict[int, Counter[str]]:
        """How many messages were refused, by the rank that they came as, and why; all zero without a secret."""
        found = self._links.refused() if self._links else {}
        beside = [channel.refused for channel in self._beside]
        return {
            peer: Counter({kind.value: n for kind, n in found.get(peer, {}).items()})
            + sum((refused[peer] for refused in beside), Counter())
            for peer in self.peers
        }

    @property
    def refused_in_all(self) -> Counter[str]:
        """How many messages were refused, and why, in all groups that there were (``reset``)."""
        return self._refused_before + self._refused_now()

    def _refused_now(self) -> Counter[str]:
        return sum(self.refused.values(), Counter())

    def reset(self, *, rank: int, world_size: int, epoch: int) -> None:
        """Begin anew between other replicas: nothing of an operation that failed, or was under way, is left.

        The messages go through whatever ``_start`` uses then; those of the group before must not arrive any more.

        Args:
            rank: of this replica among them.
            world_size: their number.
            epoch: of this group; the tags stand for it. All replicas of the group give the same, and no two groups in a row do.
        """
        if self._links is not None:
            self._links.stop()
            self._refused_before.update(self._refused_now())
            self._count_extra(self._links)
        self.rank, self.world_size = rank, world_size
        self._begin_anew()
        self._ahead = self._none_ahead()
        self._left = []
        if self._links is not None:
            self._links = self._make_links(self._links.secret, self._links.run, epoch=epoch)

    def close(self) -> None:
        """Say goodbye to the other replicas, so that each stays until the others have all they need; nothing without a secret.

        Call it after the last operation, and before the process group is destroyed.
        """
        for channel in self._beside:
            channel.close()
        if self._links is not None:
            self._links.close()
            self._count_extra(self._links)

    @override
    def channel(self) -> Channel:
        """A channel over connections of its own between the same replicas, sealed where this transport is.

        Raises:
            ReplicaLostError: another replica does not make its end.
        """
        if self.world_size == 1:
            return Channel(self, at_once=True)
        made = self._make_beside(f"channel {len(self._beside) + 1}")
        made.waits.limit_s = self.waits.limit_s
        self._beside.append(made)
        return Channel(made)

    def _make_beside(self, name: str) -> "ProcessGroupTransport":
        """A transport between the same replicas, over a gloo group of its own."""
        ranks = dist.get_process_group_ranks(self._group)
        limit = timedelta(seconds=self._timeout_s)
        if self.device.type == "cpu" and self._links is None:  # as long as in this group
            limit = self._group._get_backend(self.device).options._timeout
        alone = len(ranks) < dist.get_world_size()
        try:
            group = dist.new_group(ranks, backend="gloo", timeout=limit, use_local_synchronization=alone)
        except RuntimeError as error:
            raise self._lost(None, error) from error
        secret, run = (None, "") if self._links is None else (self._links.secret, self._links.run)
        return ProcessGroupTransport(group, secret=secret, run=f"{run}/{name}", timeout_s=self._timeout_s)

    @property
    def _beside(self) -> "list[ProcessGroupTransport]":
        """The transports of the channels beside this one."""
        group = self.group or dist.group.WORLD
        return [] if group is None else _channels.setdefault(group, [])

    @override
    def carried_bytes(self, num_bytes: int) -> int:
        return sealed_bytes(num_bytes) if self._links is not None else num_bytes

    @override
    def carry(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        if self._links is not None:
            self._carry_sealed(self._links, header, outgoing, incoming, accept)
        elif self._has_tags:
            self._carry_at_once(header, outgoing, incoming, accept)
        else:
            self._carry_headers_first(header, outgoing, incoming, accept)

    def _carry_at_once(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        room = FIRST_BYTES - len(header) if header else 0
        firsts_out = self._firsts_of(header, outgoing, room) if header else {}
        alone_in = {peer: body for peer, body in incoming.items() if body.numel() > room}
        alone_out = {peer: body for peer, body in outgoing.items() if body.numel() > room}
        left: list[InFlight] = []
        self._left = left
        self._began_s = time.perf_counter()
        for peer in incoming if header else ():
            left.append(self._ahead.take(peer, self._receive_first))
        firsts_in = {message.peer: message.buffer for message in left}
        for peer, first in firsts_out.items():
            left.append(self._start(True, peer, first, _FIRST_TAG))
        num_firsts = len(left)
        for peer, body in alone_in.items():
            left.append(self._start(False, peer, body, _tag(body)))
        for peer, body in alone_out.items():
            left.append(self._start(True, peer, body, _tag(body)))
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
        self._ahead.post(firsts_in, self._receive_first)

    @property
    def _group(self) -> dist.ProcessGroup:
        group = dist.group.WORLD if self.group is None else self.group
        assert group is not None
        return group

    def _seal(self, secret: Secret, run: str) -> None:
        if self.device.type != "cpu" or not self._has_tags or dist.get_backend(self.group) == "nccl":
            raise UsageError(
                f"ProcessGroupTransport: a secret needs messages that travel through gloo, on the CPU; the backend is "
                f"{dist.get_backend(self.group)!r}, the device {str(self.device)!r}: make the group with backend='gloo'"
            )
        if self._links is None:
            self._links = _sealed[self._group] = self._make_links(secret, run, epoch=0)
        elif self._links.secret != secret or self._links.run != run:
            raise UsageError(
                "ProcessGroupTransport: this process group is sealed with another secret or run; make a new group for another"
            )

    def _make_links(self, secret: Secret, run: str, *, epoch: int) -> SealedLinks:
        """Links to the replicas of this group, on top of ``_start`` and ``_wait``."""

        def start(sends: bool, peer: int, buffer: Tensor) -> InFlight:
            return self._start(sends, peer, buffer, _SEALED_TAG)

        def notice(peer: int, kind: Refusal, count: int) -> None:
            # The first, the tenth, the hundredth and so on: a flood must not fill the disk.
            if str(count).strip("0") == "1":
                _log.warning(
                    "replica %d refused a message that came as replica %d's and is %s (number %d of these); the run goes on",
                    self.rank,
                    peer,
                    kind.value,
                    count,
                )

        return SealedLinks(
            secret,
            run=run,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            start=start,
            wait=self._wait,
            notice=notice,
        )

    def _carry_sealed(
        self,
        links: SealedLinks,
        header: bytes,
        outgoing: Mapping[int, Tensor],
        incoming: Mapping[int, Tensor],
        accept: Accept,
    ) -> None:
        deadline = time.monotonic() + self._timeout_s
        self._began_s = time.perf_counter()
        messages: dict[int, bytearray] = {}
        try:
            links.send({peer: (header, body.numpy().data) for peer, body in outgoing.items()}, deadline)
            for peer in incoming:
                with self._waiting_for(peer, self.called(peer)):
                    messages[peer] = links.take(peer, deadline)
        except ReplicaLostError as error:
            if isinstance(error.__cause__, RuntimeError):
                # It says all of this already.
                raise
            raise ReplicaLostError(
                f"replica {self.rank} lost replica {error.rank} (of {self.world_size}) in step {self.step}: {error}",
                rank=error.rank,
            ) from error
        finally:
            self._count_extra(links)
        size = len(header)
        if header:
            try:
                accept({peer: bytes(m[:size]).ljust(size, b"\0") for peer, m in messages.items()})
            except ExchangeError:
                # The others must hear from this replica before it may end.
                links.drain(deadline)
                raise
        for peer, message in messages.items():
            if len(message) - size != incoming[peer].numel():
                raise ExchangeError(
                    f"replica {peer} sent {len(message) - size} bytes where {incoming[peer].numel()} were due in step {self.step}; "
                    "run the same muonwire on all replicas"
                )
            if len(message) > size:
                incoming[peer].copy_(torch.frombuffer(message, dtype=torch.uint8, offset=size))

    def _count_extra(self, links: SealedLinks) -> None:
        extra = links.new_extra()
        if extra.sent or extra.received:
            self.meter.add(
                "control",
                Traffic(sent_bytes=extra.sent, egress_bytes=extra.sent, received_bytes=extra.received),
            )
        self.meter.rejected = dict(self.refused_in_all)

    def _none_ahead(self) -> Ahead:
        return Ahead(partial(self._empty, FIRST_BYTES))

    def _receive_first(self, peer: int, buffer: Tensor) -> InFlight:
        return self._start(False, peer, buffer, _FIRST_TAG)

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

    def _start(self, sends: bool, peer: int, buffer: Tensor, tag: int) -> InFlight:
        try:
            if sends:
                work = dist.isend(buffer, group=self.group, group_dst=peer, tag=tag)
            else:
                work = dist.irecv(buffer, group=self.group, group_src=peer, tag=tag)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        assert work is not None
        return InFlight(peer, buffer, work)

    def _wait(self, message: InFlight, within: timedelta | None = None) -> None:
        peer = message.peer
        try:
            if within is None:
                with self._waiting_for(peer, partial(self._missing, peer)):
                    message.work.wait() if self._limit is None else message.work.wait(self._limit)
            else:
                # A thread of its own waits here; what the replica waits for is told elsewhere.
                message.work.wait(within)
        except RuntimeError as error:
            lost = self._lost(peer, error)
            others = "" if _is_timeout(error) else self._also_lost(message)
            if others:
                # Whom this replica waited for may have gone because of one of them.
                lost = ReplicaLostError(f"{lost}; and to {others}", rank=peer)
            raise lost from error

    def _also_lost(self, message: InFlight) -> str:
        """The replicas of later messages whose connections have failed by now, too."""
        lost: dict[int, str] = {}
        for other in dropwhile(lambda m: m is not message, self._left):
            if other.peer == message.peer or other.peer in lost:
                continue
            try:
                other.work.wait(_AT_ONCE)
            except RuntimeError as error:
                if not _is_timeout(error):
                    lost[other.peer] = self.called(other.peer)
        return " and ".join(lost.values())

    def _waiting_for(self, peer: int, what: Text) -> Wait:
        return self.waits.on(
            what,
            peer=self.members[peer],
            answer=lambda: f"{self.called(peer)} answered",
            since_s=self._began_s,
        )

    def _missing(self, peer: int) -> str:
        """Whose messages have not come: that of ``peer``, and of others where it can be seen."""
        missing = [other for other in self._ahead.missing() if other != peer]
        return " and ".join(map(self.called, sorted([peer, *missing])))

    def _lost(self, rank: int | None, error: RuntimeError) -> ReplicaLostError:
        who = "a replica" if rank is None else self.called(rank)
        own = f"replica {self.rank} of {self.world_size}"
        if self._has_tags and _is_timeout(error):
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


def _is_timeout(error: RuntimeError) -> bool:
    # The second is what gloo ends all connections with after the first.
    return any(text in str(error) for text in ("Timed out", "Application timeout"))


def _tag(body: Tensor) -> int:
    """The tag of a body that travels alone; bodies up to 2 GiB with different lengths have different tags."""
    return 1 + body.numel() % (_TAGS - 2)
