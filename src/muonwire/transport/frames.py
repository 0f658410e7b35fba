"""Payloads and means as frames: point-to-point messages between every two replicas, whatever carries them.

Point-to-point messages rather than collectives: payloads of different sizes go without padding, a mean is summed in rank
order, and a failed message says which replica is gone.

Frame: every message starts with 16 bytes, little-endian: magic "MX", version u8, kind and flags u8, sequence number u32,
length of what follows u64. Replicas that fall out of step are found by their sequence numbers.
"""

import struct
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from muonwire.errors import ExchangeError
from muonwire.transport.base import Flag, Transport
from muonwire.transport.meter import Meter, Traffic

HEADER = struct.Struct("<2sBBIQ")
MAGIC = b"MX"
VERSION = 1
GATHER, REDUCE, SPREAD = 1, 2, 3
KIND_NAMES = {GATHER: "gather", REDUCE: "mean (reduce)", SPREAD: "mean (spread)"}
_FLAGS = Flag.STOP | Flag.DIVERGED | Flag.CHANGED
LARGEST_PAYLOAD_BYTES = 1 << 34


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
        self._sequence = 0
        self._announced = Flag.NONE
        self._inline_bytes: dict[str, int] = {}
        self._last_lengths: dict[str, tuple[int, int]] = {}

    @abstractmethod
    def carry(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send a message to each rank and fill the buffer for each rank with what it sent; none is empty.

        Args:
            outgoing: bytes (uint8) by receiver.
            incoming: buffers (uint8) by sender, of the length that the sender's message has.

        Raises:
            ReplicaLostError: a replica stopped answering.
        """

    @property
    def peers(self) -> list[int]:
        """Ranks of the other replicas."""
        return [r for r in range(self.world_size) if r != self.rank]

    def gather(self, payload: bytes, *, purpose: str = "update") -> list[bytes]:
        """See Transport.gather: a frame to every peer, and a second message for what does not fit.

        A frame holds the header and as many bytes as ``_fitting`` expects: where lengths are steady one message does, and no
        replica waits for lengths first.
        """
        if not self.peers:
            self.agreed |= self.requested
            return [payload]
        start_s = time.perf_counter()
        inline = self._inline_bytes.get(purpose, 0)
        frame = self._header(GATHER, len(payload)) + payload[:inline].ljust(inline, b"\0")
        frames = {r: self._empty(HEADER.size + inline) for r in self.peers}
        self._swap(dict.fromkeys(self.peers, self._to_wire(frame)), frames)
        lengths = self._read_headers(GATHER, {r: f[: HEADER.size] for r, f in frames.items()})
        for rank, length in lengths.items():
            if length > LARGEST_PAYLOAD_BYTES:
                raise ExchangeError(
                    f"gather: replica {rank} announces {length} bytes; at most {LARGEST_PAYLOAD_BYTES} are allowed"
                )
        rests = {r: self._empty(max(n - inline, 0)) for r, n in lengths.items()}
        self._swap(dict.fromkeys(self.peers, self._to_wire(payload[inline:])), rests)
        payloads = [
            payload if r == self.rank else _bytes(frames[r])[HEADER.size :][: lengths[r]] + _bytes(rests[r])
            for r in range(self.world_size)
        ]
        all_lengths = [len(payload), *lengths.values()]
        self._inline_bytes[purpose] = self._fitting(purpose, all_lengths)
        one_copy = len(frame) + len(payload[inline:])
        self._count(
            purpose,
            sent=one_copy,
            egress=one_copy * len(self.peers),
            received=sum(t.numel() for part in (frames, rests) for t in part.values()),
            num_messages=2 if max(all_lengths) > inline else 1,
            start_s=start_s,
        )
        return payloads

    def _fitting(self, purpose: str, lengths: Sequence[int]) -> int:
        """Bytes of payload in the next frame of this purpose, from what all replicas know.

        The longest of this round where all lengths, of this round and the last, lie close together; else the shortest, since a
        frame that is longer than its payload carries padding.
        """
        before = self._last_lengths.get(purpose, (min(lengths), max(lengths)))
        self._last_lengths[purpose] = now = (min(lengths), max(lengths))
        longest, shortest = max(before[1], now[1]), min(before[0], now[0])
        return now[1] + now[1] // 256 if longest - shortest <= longest // 64 else shortest

    def mean(self, tensors: Sequence[Tensor], *, purpose: str = "update") -> list[Tensor]:
        """See Transport.mean: replica j sums the j-th part of everything in rank order and hands the result back.

        The sizes must agree before: gloo ends the process where a message is longer than its receiver expects.
        """
        if not self.peers:
            self.agreed |= self.requested
            return list(tensors)
        results: list[Tensor | None] = [None] * len(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            indices = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].reshape(-1) for i in indices]) if indices else torch.empty(0)
            mean = self._mean_flat(flat, purpose)
            sizes = [tensors[i].numel() for i in indices]
            for i, part in zip(indices, torch.split(mean, sizes), strict=True):
                results[i] = part.view(tensors[i].shape)
        return [r for r in results if r is not None]

    def _mean_flat(self, flat: Tensor, purpose: str) -> Tensor:
        start_s = time.perf_counter()
        part_numel = -(-flat.numel() // self.world_size)
        part_bytes = part_numel * flat.element_size()
        frame_bytes = HEADER.size + part_bytes
        outgoing = torch.zeros(self.world_size, frame_bytes, dtype=torch.uint8, device=self.device)
        padded = torch.zeros(self.world_size * part_numel, dtype=flat.dtype, device=self.device)
        padded[: flat.numel()] = flat
        outgoing[:, HEADER.size :] = padded.view(torch.uint8).view(self.world_size, part_bytes)
        outgoing[:, : HEADER.size] = self._to_wire(self._header(REDUCE, part_bytes))
        incoming = torch.empty_like(outgoing)
        self._swap({r: outgoing[r] for r in self.peers}, {r: incoming[r] for r in self.peers})
        self._check_lengths(REDUCE, {r: incoming[r, : HEADER.size] for r in self.peers}, part_bytes)
        incoming[self.rank] = outgoing[self.rank]

        wide = torch.float32 if flat.element_size() < 4 else flat.dtype
        parts = incoming[:, HEADER.size :].contiguous().view(flat.dtype)
        total = parts[0].to(wide, copy=True)
        for part in parts[1:]:
            total += part.to(wide)
        total /= self.world_size

        frame = torch.empty(frame_bytes, dtype=torch.uint8, device=self.device)
        frame[: HEADER.size] = self._to_wire(self._header(SPREAD, part_bytes))
        frame[HEADER.size :] = total.to(flat.dtype).view(torch.uint8)
        self._swap(dict.fromkeys(self.peers, frame), {r: incoming[r] for r in self.peers})
        self._check_lengths(SPREAD, {r: incoming[r, : HEADER.size] for r in self.peers}, part_bytes)
        incoming[self.rank] = frame
        mean = incoming[:, HEADER.size :].contiguous().view(flat.dtype).view(-1)[: flat.numel()]

        self._count(
            purpose,
            sent=self.world_size * frame_bytes,
            egress=2 * len(self.peers) * frame_bytes,
            received=2 * len(self.peers) * frame_bytes,
            num_messages=2,
            start_s=start_s,
        )
        return mean.to(flat.device)

    def _header(self, kind: int, length: int) -> bytes:
        self._sequence = (self._sequence + 1) % (1 << 32)
        self._announced = self.requested
        return HEADER.pack(MAGIC, VERSION, kind | self._announced, self._sequence, length)

    def _read_headers(self, kind: int, headers: Mapping[int, Tensor]) -> dict[int, int]:
        lengths = {}
        agreed = self.agreed | self._announced
        for rank, header in headers.items():
            magic, version, kind_and_flags, sequence, length = HEADER.unpack(_bytes(header))
            theirs = kind_and_flags & ~_FLAGS
            if magic != MAGIC or version != VERSION:
                raise ExchangeError(
                    f"{KIND_NAMES[kind]}: replica {rank} sent a frame with magic {magic!r}, version {version}; this is "
                    f"{MAGIC!r}, version {VERSION}: run the same muonwire on all replicas"
                )
            if (theirs, sequence) != (kind, self._sequence):
                raise ExchangeError(
                    f"replicas are out of step: replica {self.rank} is at operation {self._sequence} ({KIND_NAMES[kind]}), "
                    f"replica {rank} at {sequence} ({KIND_NAMES.get(theirs, theirs)}); all must call the same operations"
                )
            agreed |= Flag(kind_and_flags & _FLAGS)
            lengths[rank] = length
        self.agreed = agreed
        return lengths

    def _check_lengths(self, kind: int, headers: Mapping[int, Tensor], expected: int) -> None:
        for rank, length in self._read_headers(kind, headers).items():
            if length != expected:
                raise ExchangeError(
                    f"{KIND_NAMES[kind]}: replica {rank} sent {length} bytes, {expected} were expected: "
                    "the replicas' models or parameter groups differ"
                )

    def _empty(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _to_wire(self, data: bytes) -> Tensor:
        buffer = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if data
            else torch.empty(0, dtype=torch.uint8)
        )
        return buffer.to(self.device)

    def _swap(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send and receive at once; a message without bytes is not sent, as both sides know its length."""
        outgoing = {r: m for r, m in outgoing.items() if m.numel()}
        incoming = {r: m for r, m in incoming.items() if m.numel()}
        if outgoing or incoming:
            self.carry(outgoing, incoming)

    def _count(
        self, purpose: str, *, sent: int, egress: int, received: int, num_messages: int, start_s: float
    ) -> None:
        self.meter.add(
            purpose,
            Traffic(
                sent_bytes=sent,
                egress_bytes=egress,
                received_bytes=received,
                num_messages=num_messages,
                wait_s=time.perf_counter() - start_s,
            ),
        )


def _bytes(message: Tensor) -> bytes:
    return message.cpu().numpy().tobytes()
