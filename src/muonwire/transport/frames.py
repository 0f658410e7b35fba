"""Payloads and means as frames: point-to-point messages between every two replicas; subclasses carry them.

Point-to-point messages rather than collectives: payloads of different sizes go without padding, a mean is summed in rank
order, and a failed message shows which replica was lost. Every frame starts with a header (``header.py``), and no body is
read before the headers of all replicas agree.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import ExchangeError, ReplicaLostError
from muonwire.transport.base import Flag, Transport, check_count
from muonwire.transport.header import (
    ALL_TO_ALL,
    FREE_LENGTHS,
    GATHER,
    HEADER,
    LARGEST_LENGTH,
    REDUCE,
    REPORT,
    SPREAD,
    Header,
    SiteFailedError,
    check_lockstep,
    checksum,
)
from muonwire.transport.meter import Meter, Traffic

LARGEST_PAYLOAD_BYTES = 1 << 34
# Before each payload of an all-to-all, whose header is one for all receivers: its own length.
LENGTH_BYTES = 5

Accept = Callable[[Mapping[int, bytes]], None]


class FrameTransport(Transport):
    """Gathers and means out of frames; a subclass carries them.

    Args:
        rank: of this replica.
        world_size: number of replicas.
        device: where messages are kept while they travel.
    """

    def __init__(self, *, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.meter = Meter()
        self.device = device
        self._begin_anew()
        self._purposes = {checksum(purpose): purpose for purpose in ("update", "digest", "control")}

    def _begin_anew(self) -> None:
        self._sequence = 0
        self._failure: ExchangeError | None = None
        self._inline_bytes: dict[str, int] = {}
        self._last_lengths: dict[str, tuple[int, int]] = {}
        # Of messages from one replica to another alone: by series, sender and receiver.
        self._room: dict[tuple[str, int, int], int] = {}
        self._length_before: dict[tuple[str, int, int], int] = {}

    @abstractmethod
    def carry(
        self, header: bytes, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], accept: Accept
    ) -> None:
        """Send the header and a body to each peer, and fill the buffer for each peer with the body that it sent.

        A peer may be in another operation, with a body of any size. So ``accept`` is called with all peers' headers before any body
        is read, and raises where bodies do not fit; its error ends ``carry``, even with messages still on their way.

        Args:
            header: 16 bytes, or none where sizes are known from an earlier frame; then no body is empty, and a peer without a
                body is left out.
            outgoing: bodies (uint8) by receiver.
            incoming: buffers (uint8) by sender.
            accept: takes the peers' headers by rank; not called without a header.

        Raises:
            ExchangeError: what ``accept`` raised.
            ReplicaLostError: a replica stopped answering.
        """

    def carried_bytes(self, num_bytes: int) -> int:
        """Bytes on the wire of a message of ``num_bytes`` to one peer; more than it has where ``carry`` adds some."""
        return num_bytes

    @property
    def peers(self) -> list[int]:
        """Ranks of the other replicas."""
        return [r for r in range(self.world_size) if r != self.rank]

    @override
    def gather(self, payload: bytes, *, purpose: str = "update", observers: bool = False) -> list[bytes]:
        """A frame to every peer, and a second message for what does not fit into it.

        A frame holds the header and as many bytes as ``_fitting`` expects. Where lengths are steady one message is enough, and no
        replica has to wait for lengths first.
        """
        if not self.peers:
            self.agreed |= self.requested
            return [payload]
        with self._operation():
            return self._gather(payload, purpose, observers=observers)

    def _gather(self, payload: bytes, purpose: str, *, observers: bool) -> list[bytes]:
        start_s = time.perf_counter()
        observing = self._observing(purpose) and not observers
        payload = b"" if observing else payload
        series = purpose + self.series
        inline = self._inline_bytes.get(series, 0)
        check = checksum(purpose)
        self._purposes[check] = purpose
        frames = {r: self._empty(inline) for r in self.peers}
        body = self._to_wire(payload[:inline].ljust(inline, b"\0"))
        headers = self._swap_frames(
            self._header(GATHER, check, min(len(payload), LARGEST_LENGTH), observing=observing),
            dict.fromkeys(self.peers, body),
            frames,
            about=str,
        )
        lengths = {r: header.length for r, header in headers.items()}
        rest = payload[inline:]
        rests = {r: self._empty(n - inline) for r, n in lengths.items() if n > inline}
        if rest or rests:
            to_all = dict.fromkeys(self.peers, self._to_wire(rest)) if rest else {}
            self.carry(b"", to_all, rests, lambda _: None)
        payloads = [
            payload
            if r == self.rank
            else _bytes(frames[r][: lengths[r]]) + (_bytes(rests[r]) if r in rests else b"")
            for r in self._contributors(observing, headers)
        ]
        all_lengths = [len(payload), *lengths.values()]
        self._inline_bytes[series] = self._fitting(series, all_lengths)
        first = self.carried_bytes(HEADER.size + inline)
        one_copy = first + (self.carried_bytes(len(rest)) if rest else 0)
        traffic = Traffic(
            sent_bytes=one_copy,
            egress_bytes=one_copy * len(self.peers),
            received_bytes=len(self.peers) * first
            + sum(self.carried_bytes(t.numel()) for t in rests.values()),
            num_messages=2 if max(all_lengths) > inline else 1,
            wait_s=time.perf_counter() - start_s,
        )
        self.meter.add(purpose, traffic)
        return payloads

    def _observing(self, purpose: str) -> bool:
        return self.observes and purpose == "update"

    def _contributors(self, observing: bool, headers: Mapping[int, Header]) -> list[int]:
        """Ranks of the replicas that do not observe.

        Raises:
            ExchangeError: all observe; on all of them.
        """
        others = [r for r, header in headers.items() if Flag.OBSERVES not in header.flags]
        ranks = sorted([*others, *([] if observing else [self.rank])])
        if not ranks:
            raise ExchangeError(
                f"all {self.world_size} replicas observe, and none brings an update; one must have trained"
            )
        return ranks

    def _fitting(self, series: str, lengths: Sequence[int]) -> int:
        """Bytes of payload in the next frame of this series; all replicas find the same number.

        It is the longest of this round where all lengths of this round and the last lie close together; else the shortest, since
        a frame that is longer than its payload carries padding.
        """
        before = self._last_lengths.get(series, (min(lengths), max(lengths)))
        self._last_lengths[series] = now = (min(lengths), max(lengths))
        longest, shortest = max(before[1], now[1]), min(before[0], now[0])
        return now[1] + now[1] // 256 if longest - shortest <= longest // 64 else shortest

    @override
    def all_to_all(self, payloads: Sequence[bytes], *, purpose: str = "update") -> list[bytes]:
        """A frame to every peer, and a second message where a payload does not fit into it.

        How many bytes a frame has room for follows from the lengths of the last two payloads from its sender to its receiver, which
        both know. Where these lengths are steady one message is enough.
        """
        check_count(payloads, self.world_size)
        if not self.peers:
            self.agreed |= self.requested
            return list(payloads)
        with self._operation():
            return self._all_to_all(payloads, purpose)

    def _all_to_all(self, payloads: Sequence[bytes], purpose: str) -> list[bytes]:
        start_s = time.perf_counter()
        observing = self._observing(purpose)
        payloads = [b""] * self.world_size if observing else payloads
        check = checksum(purpose)
        self._purposes[check] = purpose
        series = purpose + self.series
        room_out = {r: self._room.get((series, self.rank, r), 0) for r in self.peers}
        room_in = {r: self._room.get((series, r, self.rank), 0) for r in self.peers}
        frames = {r: self._empty(LENGTH_BYTES + room) for r, room in room_in.items()}
        bodies = {
            r: self._to_wire(
                len(payloads[r]).to_bytes(LENGTH_BYTES, "little") + payloads[r][:room].ljust(room, b"\0")
            )
            for r, room in room_out.items()
        }
        longest = min(max(map(len, payloads)), LARGEST_LENGTH)
        headers = self._swap_frames(
            self._header(ALL_TO_ALL, check, longest, observing=observing), bodies, frames, about=str
        )
        received = {r: _bytes(frame) for r, frame in frames.items()}
        lengths = {r: int.from_bytes(frame[:LENGTH_BYTES], "little") for r, frame in received.items()}
        for r, length in lengths.items():
            if length > headers[r].length:
                raise ExchangeError(
                    f"all-to-all: replica {r} announces {length} bytes, and at most {headers[r].length} to any replica in its "
                    "header"
                )
        rests_out = {
            r: self._to_wire(payloads[r][room:]) for r, room in room_out.items() if len(payloads[r]) > room
        }
        rests_in = {r: self._empty(lengths[r] - room) for r, room in room_in.items() if lengths[r] > room}
        if rests_out or rests_in:
            self.carry(b"", rests_out, rests_in, lambda _: None)
        for r in self.peers:
            self._fit((series, self.rank, r), len(payloads[r]))
            self._fit((series, r, self.rank), lengths[r])
        sent = self._carried(bodies, HEADER.size) + self._carried(rests_out)
        traffic = Traffic(
            sent_bytes=sent,
            egress_bytes=sent,
            received_bytes=self._carried(frames, HEADER.size) + self._carried(rests_in),
            num_messages=2 if rests_out or rests_in else 1,
            wait_s=time.perf_counter() - start_s,
        )
        self.meter.add(purpose, traffic)
        return [
            payloads[r]
            if r == self.rank
            else received[r][LENGTH_BYTES:][: lengths[r]] + (_bytes(rests_in[r]) if r in rests_in else b"")
            for r in self._contributors(observing, headers)
        ]

    def _carried(self, messages: Mapping[int, Tensor], header_bytes: int = 0) -> int:
        return sum(self.carried_bytes(header_bytes + message.numel()) for message in messages.values())

    def _fit(self, link: tuple[str, int, int], length: int) -> None:
        """Note the length of a payload from one replica to another, from which both find the room in the next frame.

        It is the length where that has not changed, somewhat more than the longer of the last two where these lie close together,
        else the shorter.
        """
        before = self._length_before.get(link, length)
        self._length_before[link] = length
        shorter, longer = sorted((before, length))
        padding = longer // 256 if longer > shorter else 0
        self._room[link] = longer + padding if longer - shorter <= longer // 64 else shorter

    @torch.no_grad()
    @override
    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """Replica j sums the j-th part of everything in rank order and sends the result to all.

        The tensors of each dtype travel together. Results of one dtype are views of one tensor, where their devices are one.
        """
        if not self.peers:
            self.agreed |= self.requested
            return list(tensors)
        with self._operation():
            check = checksum(f"{purpose} {[(t.dtype, *t.shape) for t in tensors]}")
            results: list[Tensor | None] = [None] * len(tensors)
            # An empty list is an operation too: other replicas may average something, which must be noticed.
            for dtype in dict.fromkeys(t.dtype for t in tensors) or (torch.float32,):
                indices = [i for i, t in enumerate(tensors) if t.dtype == dtype]
                alike = [tensors[i] for i in indices]
                mean = self._mean_flat(alike, dtype, check, purpose, about=lambda: self._about(tensors))
                for i, part in zip(indices, _returned(mean, alike), strict=True):
                    results[i] = part
            return [r for r in results if r is not None]

    def _mean_flat(
        self,
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
        check: int,
        purpose: str,
        *,
        about: Callable[[], str],
    ) -> Tensor:
        start_s = time.perf_counter()
        observing = self._observing(purpose)
        numel = sum(t.numel() for t in tensors)
        # Holds the tensors, then their mean: each part of the mean overwrites the part that this replica sent.
        flat = self._flatten(tensors, numel, -numel % self.world_size, dtype)
        parts = flat.view(self.world_size, -1) if numel else flat.new_empty(self.world_size, 0)
        wire = parts.view(torch.uint8)
        part_bytes = wire.shape[1]
        theirs = {r: torch.empty_like(parts[r]) for r in self.peers}
        headers = self._swap_frames(
            self._header(REDUCE, check, part_bytes, observing=observing),
            {r: wire[r] for r in self.peers},
            {r: part.view(torch.uint8) for r, part in theirs.items()},
            about=about,
        )
        ranks = self._contributors(observing, headers)
        parts[self.rank] = self._mean_of(theirs, parts[self.rank], ranks)
        del theirs
        self._swap_frames(
            self._header(SPREAD, check, part_bytes),
            dict.fromkeys(self.peers, wire[self.rank]),
            {r: wire[r] for r in self.peers},
            about=about,
        )
        frame_bytes = self.carried_bytes(HEADER.size + part_bytes)
        traffic = Traffic(
            sent_bytes=self.world_size * frame_bytes,
            egress_bytes=2 * len(self.peers) * frame_bytes,
            received_bytes=2 * len(self.peers) * frame_bytes,
            num_messages=2,
            wait_s=time.perf_counter() - start_s,
        )
        self.meter.add(purpose, traffic)
        return flat[:numel]

    def _flatten(self, tensors: Sequence[Tensor], numel: int, padding: int, dtype: torch.dtype) -> Tensor:
        flat = torch.empty(numel + padding, dtype=dtype, device=self.device)
        flat[numel:] = 0
        if tensors:
            rows = [t.reshape(-1) for t in tensors]
            if len({row.device for row in rows}) > 1:
                for place, row in zip(_split(flat[:numel], tensors), rows, strict=True):
                    place.copy_(row)
            elif rows[0].device == flat.device:
                torch.cat(rows, out=flat[:numel])
            else:
                flat[:numel] = torch.cat(rows)
        return flat

    def _mean_of(self, theirs: Mapping[int, Tensor], own: Tensor, ranks: Sequence[int]) -> Tensor:
        wide = torch.float32 if own.element_size() < 4 else own.dtype
        first, *others = ranks
        total = theirs.get(first, own).to(wide, copy=True)
        for rank in others:
            total += theirs.get(rank, own).to(wide)
        total /= len(ranks)
        return total

    def _about(self, tensors: Sequence[Tensor]) -> str:
        dtypes = ", ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors))
        numel = sum(t.numel() for t in tensors)
        return f"Replica {self.rank}, this one, averages {len(tensors)} tensor(s), {numel} numbers in all ({dtypes})"

    @contextmanager
    def _operation(self) -> Iterator[None]:
        """Let every operation after a failed one fail at once, since messages of the failed one may still arrive."""
        if self._failure is not None:
            text = (
                f"this transport failed before and cannot be used again: {self._failure} Start the replicas again and resume from "
                "the last checkpoint, or make a new process group and a new transport on all of them"
            )
            if isinstance(self._failure, ReplicaLostError):
                raise ReplicaLostError(text, rank=self._failure.rank)
            raise ExchangeError(text)
        try:
            yield
        except ReplicaLostError as error:
            self._failure = ReplicaLostError(f"{error}.", rank=error.rank)
            raise
        except ExchangeError as error:
            self._failure = ExchangeError(f"{error}.")
            raise

    def report(self, *, lost: int | None) -> None:
        """Tell the peers, in place of their next operation, that the site of this replica cannot go on; it is the last message.

        It returns when all peers have come to that operation; nothing where this transport has failed already.

        Args:
            lost: place in the site of the replica that it lost. None: it ended for another reason.
        """
        if self._failure is not None or not self.peers:
            return
        self._failure = SiteFailedError(site=self.rank, lost=lost)
        header = self._header(REPORT, 0 if lost is None else lost + 1, 0)

        def end(_: Mapping[int, bytes]) -> None:
            # Whatever they send is not for a replica that cannot go on.
            raise ExchangeError("reported")

        bodies = dict.fromkeys(self.peers, self._empty(0))
        with suppress(ExchangeError):
            self.carry(header.pack(), bodies, {r: self._empty(0) for r in self.peers}, end)

    def _header(self, kind: int, check: int, length: int, *, observing: bool = False) -> Header:
        self._sequence = (self._sequence + 1) % (1 << 8)
        return Header(
            kind=kind,
            flags=self.requested | Flag.OBSERVES if observing else self.requested,
            step=self.step % (1 << 32),
            sequence=self._sequence,
            check=check,
            length=length,
            settings=checksum(self.settings) & 0xFF,
        )

    def _swap_frames(
        self,
        own: Header,
        outgoing: Mapping[int, Tensor],
        incoming: Mapping[int, Tensor],
        *,
        about: Callable[[], str],
    ) -> dict[int, Header]:
        """Send and receive at the same time; returns the peers' headers, which agree with this replica's."""
        headers: dict[int, Header] = {}

        def accept(received: Mapping[int, bytes]) -> None:
            headers.update({rank: Header.unpack(data, rank=rank) for rank, data in received.items()})
            check_lockstep(
                {self.rank: own, **headers}, purposes=self._purposes, about=about, settings=self.settings
            )
            for rank, header in sorted({self.rank: own, **headers}.items()):
                if header.kind in FREE_LENGTHS and header.length > LARGEST_PAYLOAD_BYTES:
                    raise ExchangeError(
                        f"{header.name}: the payload of replica {rank} has {header.length} bytes; at most {LARGEST_PAYLOAD_BYTES} "
                        "are allowed"
                    )
                self.agreed |= header.flags & ~Flag.OBSERVES

        self.carry(own.pack(), outgoing, incoming, accept)
        return headers

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _to_wire(self, data: bytes) -> Tensor:
        return (
            torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device) if data else self._empty(0)
        )


def _bytes(message: Tensor) -> bytes:
    return message.cpu().numpy().tobytes()


def _split(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Pieces of ``flat`` with as many entries as the tensors have."""
    return torch.split(flat, [t.numel() for t in like])


def _returned(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The pieces in the tensors' shapes and on their devices, with one transfer if that is one device."""
    devices = {t.device for t in like}
    # Nobody writes to ``flat`` any more, so that the host need not wait until it has gone to a device; for what comes from one it
    # must.
    from_host = flat.device.type == "cpu"
    if len(devices) == 1:
        flat = flat.to(devices.pop(), non_blocking=from_host)
    pieces = zip(_split(flat, like), like, strict=True)
    return [piece.to(t.device, non_blocking=from_host).view(t.shape) for piece, t in pieces]
