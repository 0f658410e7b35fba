"""Means by owners: each part of a group's tensors has one replica that averages it for all.

Of R replicas, replica j owns part j: all send it their payloads of that part, it averages them in rank order and sends all
the mean. A replica so sends its update once and 1/R of the mean to R − 1 others, whatever R is, where a gather sends the update
R − 1 times.
"""

import struct
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from muonwire.codec import parts, sums
from muonwire.codec.base import Codec, Drafts, Encoded
from muonwire.codec.part import Shape
from muonwire.codec.quantize import scales as bfloat16
from muonwire.errors import PayloadError
from muonwire.stages.base import Context, State, States
from muonwire.stages.damage import blame
from muonwire.stages.pieces import UNITS, Piece, assemble, cut
from muonwire.stages.rounds import Reply, Request, read

OWNER = "owner"
# Of a tensor whose sums travel: the level of each entry's last one, the same on all replicas.
SUMS, LEVELS = "sums", "levels"
# Of a tensor whose means are recompressed: the last one as it was decoded, the same on all replicas.
LAST, MEAN = "last", "mean"
_SEED = struct.Struct("<QQQ")


def piece_seed(*, step: int, tensor: int, owner: int) -> int:
    """32 bits for one piece of one tensor in one round, the same on all replicas."""
    return zlib.crc32(_SEED.pack(step, tensor, owner))


def own_seed(codec: Codec, seed: int, rank: int) -> int:
    """``seed``, which is the same on all replicas; where they take turns, that of the replica ``rank``."""
    return (seed + rank) % 2**32 if codec.takes_turns else seed


@dataclass(frozen=True, kw_only=True)
class Owners:
    """Sends pieces of tensors to their owners, and takes the means.

    Args:
        codec: of the pieces on their way to the owners.
        mean_codec: of the means on their way back; none sends them without loss, as sums of signs.
        over: see Exchange.
        decay: of what the owner keeps of a mean from round to round, with a mean_codec.
        prediction: share of the last decoded mean that is taken off a mean before it goes through the mean_codec, and put back
            by all.
    """

    codec: Codec
    mean_codec: Codec | None
    over: str
    decay: float
    prediction: float

    def pieces(self, shapes: tuple[Shape, ...], owners: int) -> tuple[tuple[Piece, ...], ...]:
        """By owner: its pieces, cut as finely as both codecs allow."""
        units = [UNITS.index(c.unit) for c in (self.codec, self.mean_codec) if c is not None]
        return cut(shapes, owners, UNITS[max(units)])

    def part_bytes(self, shapes: tuple[Shape, ...], replicas: int) -> list[tuple[int, int]]:
        """By owner: the bytes of its part as one replica sends it, and those of its mean."""
        found = []
        for pieces in self.pieces(shapes, replicas):
            there = parts.num_bytes([self.codec.estimate_body_bytes(piece.shape) for piece in pieces])
            back = 0
            if self.mean_codec is not None:
                back = parts.num_bytes([self.mean_codec.estimate_body_bytes(piece.shape) for piece in pieces])
            elif pieces:
                back = parts.num_bytes([sums.estimate_bytes(p.end - p.begin, replicas) for p in pieces])
            found.append((there, back))
        return found

    def total_bytes(self, shapes: tuple[Shape, ...], replicas: int) -> tuple[int, int]:
        """Bytes of all parts that one replica makes, and of all owners' means."""
        there, back = zip(*self.part_bytes(shapes, replicas), strict=True)
        return sum(there), sum(back)

    def estimate_bytes(self, shapes: tuple[Shape, ...], replicas: int) -> float:
        """Bytes that a replica sends on average, each payload once however many get it: R − 1 parts of R, and 1/R of the means."""
        there, back = self.total_bytes(shapes, replicas)
        return ((replicas - 1) * there + back) / replicas

    def encode(
        self,
        signal: Tensor,
        pieces: Sequence[tuple[int, Piece]],
        context: Context,
        *,
        state: State | None,
    ) -> list[tuple[Piece, Encoded]]:
        """One tensor's pieces, each encoded by itself; ``pieces`` names the owner of each."""
        return [
            (
                piece,
                self.codec.encode_body(
                    piece.of(signal),
                    seed=own_seed(
                        self.codec,
                        piece_seed(step=context.step, tensor=piece.tensor, owner=owner),
                        context.transport.rank,
                    ),
                    state=state,
                ),
            )
            for owner, piece in pieces
        ]

    def rounds(
        self,
        bodies: Sequence[Sequence[bytes]],
        shapes: tuple[Shape, ...],
        scales: Tensor | None,
        states: States,
        context: Context,
        devices: Sequence[torch.device],
    ) -> Generator[Request, Reply, list[Tensor]]:
        """The tensors' means, the same bits on all replicas.

        Args:
            bodies: by owner, of its pieces.
            shapes: of the tensors.
            scales: that the replicas share, one a tensor; none where the codec shares none.
            states: of the tensors; what the owner keeps is under "owner", what all know of their sums under "sums", and the last
                mean that went through a codec under "last".
            context: of the round.
            devices: of the tensors, on which their means are made.

        Raises:
            PayloadError: a replica sent what does not decode; on all replicas, and it names that one.
        """
        transport = context.transport
        cuts = self.pieces(shapes, transport.world_size)
        sent = [
            parts.pack(str(self.codec), [p.shape for p in pieces], of_owner)
            for pieces, of_owner in zip(cuts, bodies, strict=True)
        ]
        round_of_parts = yield Request(parts=sent)
        own = cuts[transport.rank]
        known = [[self._known(states[piece.tensor], piece) for piece in pieces] for pieces in cuts]
        texts = [self._mean_text(states, *of) for of in zip(cuts, known, strict=True)]
        try:
            mean = b""
            if own:
                if self.mean_codec is None:
                    sent = self._count(round_of_parts.payloads, own, known[transport.rank], scales, context)
                else:
                    sent = yield from self._encode_mean(
                        self.mean_codec, round_of_parts.payloads, own, states, context, devices
                    )
                mean = parts.pack(texts[transport.rank], [piece.shape for piece in own], sent)
        except PayloadError as error:
            # The others cannot see what this replica was sent; all must stop for the same reason.
            mean = parts.refuse(str(error))
        round_of_means = yield Request(payload=mean, observers=True)
        received = round_of_means.payloads
        shared = () if scales is None else tuple(scales.tolist())
        key = ("owners", str(self), shapes, shared, *devices, *texts, *received)
        if self.mean_codec is not None:
            changes = transport.once(key, lambda: self._decode_means(received, cuts, texts, shapes, devices))
            return [self._predicted(state, change) for state, change in zip(states, changes, strict=True)]
        means, levels = transport.once(
            key,
            lambda: self._decode_sums(
                received, cuts, texts, known, shapes, scales, transport.world_size, devices
            ),
        )
        for state, of_tensor in zip(states, levels, strict=True):
            state[SUMS] = {LEVELS: of_tensor}
        return means

    def _known(self, state: State, piece: Piece) -> sums.Known:
        """What all replicas know of the piece's next sums."""
        levels: Tensor | None = state.get(SUMS, {}).get(LEVELS) if self.mean_codec is None else None
        count = piece.end - piece.begin
        if levels is None:
            return sums.Known(count=count)
        return sums.Known(count=count, levels=levels.reshape(-1)[piece.begin : piece.end].cpu().numpy())

    def _mean_text(self, states: States, pieces: Sequence[Piece], known: Sequence[sums.Known]) -> str:
        """What the checksum of an owner's mean stands for: it can be read by those alone who know the same of the ones before."""
        check = 0
        for piece, of in zip(pieces, known, strict=True):
            last = states[piece.tensor].get(LAST, {}).get(MEAN) if self.prediction else None
            if of.levels is not None:
                check = zlib.crc32(of.levels.tobytes(), check)
            elif last is not None and self.mean_codec is not None:
                check = zlib.crc32(
                    piece.of(last).cpu().reshape(-1).view(torch.uint8).numpy().tobytes(), check
                )
        what = f"sums of {self.codec}" if self.mean_codec is None else f"mean by {self.mean_codec}"
        return f"{what} after {check:08x}"

    def _predicted(self, state: State, change: Tensor) -> Tensor:
        """The tensor's mean, ρ u′ + change, which is kept for the next round."""
        if not self.prediction:
            return change
        last: Tensor | None = state.get(LAST, {}).get(MEAN)
        mean = change.clone() if last is None else change + self.prediction * last.to(change.dtype)
        state[LAST] = {MEAN: mean}
        return mean

    def _unpacked(self, received: Sequence[bytes], pieces: Sequence[Piece]) -> list[list[bytes]]:
        """The bodies that each replica sent of the pieces."""
        shapes, found = [piece.shape for piece in pieces], []
        for rank, message in enumerate(received):
            try:
                found.append(parts.unpack(message, codec_text=str(self.codec), shapes=shapes))
            except PayloadError as error:
                raise PayloadError(f"from replica {rank}: {error}") from error
        return found

    def _count(
        self,
        received: Sequence[bytes],
        pieces: Sequence[Piece],
        known: Sequence[sums.Known],
        scales: Tensor | None,
        context: Context,
    ) -> list[bytes]:
        """Of each piece the sum of the signs of each entry."""
        agreed = _shared(scales, pieces)
        counts = [np.zeros(piece.end - piece.begin, dtype=np.int64) for piece in pieces]
        for rank, bodies in enumerate(self._unpacked(received, pieces)):
            for piece, body, (scale, _), total in zip(pieces, bodies, agreed, counts, strict=True):
                try:
                    total += sums.positive(body, len(total), scale=scale)
                except PayloadError as error:
                    raise PayloadError(f"from replica {rank}: {_named(piece, context)}: {error}") from error
        return [sums.pack(total, len(received), of) for total, of in zip(counts, known, strict=True)]

    def _encode_mean(
        self,
        mean_codec: Codec,
        received: Sequence[bytes],
        pieces: Sequence[Piece],
        states: States,
        context: Context,
        devices: Sequence[torch.device],
    ) -> Generator[Request, Reply, list[bytes]]:
        """The mean of each piece, with what is kept of earlier means; keeps what is not sent."""
        by_rank = self._unpacked(received, pieces)
        drafts = Drafts()
        kept: dict[int, State] = {i: {} for i in range(len(states))}

        def damaged(k: int) -> PayloadError:
            bodies, what = [of_rank[k] for of_rank in by_rank], _named(pieces[k], context)
            return blame(self.codec, bodies, pieces[k].shape, dtype=torch.float32, what=what)

        for k, piece in enumerate(pieces):
            bodies = [of_rank[k] for of_rank in by_rank]
            mean = None
            with suppress(PayloadError):
                device = devices[piece.tensor]
                mean = self.codec.mean_bodies(bodies, piece.shape, over=self.over, device=device)
            if mean is None or not drafts.checks.add(mean):
                raise damaged(k)
            residual = _residual(states[piece.tensor], piece)
            signal = (
                mean if residual is None else mean + self.decay * residual.to(mean.dtype).view(mean.shape)
            )
            last = states[piece.tensor].get(LAST, {}).get(MEAN)
            if last is not None:
                signal = signal - self.prediction * piece.of(last).to(signal.dtype)
            encoded = mean_codec.encode_body(
                signal,
                seed=piece_seed(step=context.step, tensor=piece.tensor, owner=context.transport.rank),
            )
            kept[piece.tensor] = {
                "residual": (signal - encoded.decoded).reshape(-1),
                "begin": piece.begin,
            }
            drafts.add(encoded)
        written = drafts.write((yield from read(drafts.values)))
        if None in written:
            raise damaged(written.index(None))
        for i, state in enumerate(states):
            state[OWNER] = kept[i]
        return [of_piece[0] for of_piece in written if of_piece]

    def _mean_bodies(
        self, received: Sequence[bytes], cuts: Sequence[Sequence[Piece]], texts: Sequence[str]
    ) -> Iterator[tuple[int, list[bytes]]]:
        """Of each owner its number, and the bodies of its pieces."""
        for owner, (message, pieces, text) in enumerate(zip(received, cuts, texts, strict=True)):
            with _from(owner):
                bodies = parts.unpack(message, codec_text=text, shapes=[piece.shape for piece in pieces])
            yield owner, bodies

    def _decode_means(
        self,
        received: Sequence[bytes],
        cuts: Sequence[Sequence[Piece]],
        texts: Sequence[str],
        shapes: tuple[Shape, ...],
        devices: Sequence[torch.device],
    ) -> list[Tensor]:
        """The means of all tensors, out of the owners' messages."""
        assert self.mean_codec is not None
        found: list[list[tuple[Piece, Tensor]]] = [[] for _ in shapes]
        for owner, bodies in self._mean_bodies(received, cuts, texts):
            with _from(owner):
                for piece, body in zip(cuts[owner], bodies, strict=True):
                    device = devices[piece.tensor]
                    decoded = self.mean_codec.decode_body(body, piece.shape, device=device)
                    found[piece.tensor].append((piece, decoded))
        dtypes = {values.dtype for of_tensor in found for _, values in of_tensor}
        dtype = dtypes.pop() if dtypes else torch.float32
        return [
            assemble(pieces, shape, dtype=dtype, device=device)
            for pieces, shape, device in zip(found, shapes, devices, strict=True)
        ]

    def _decode_sums(
        self,
        received: Sequence[bytes],
        cuts: Sequence[Sequence[Piece]],
        texts: Sequence[str],
        known: Sequence[Sequence[sums.Known]],
        shapes: tuple[Shape, ...],
        scales: Tensor | None,
        largest: int,
        devices: Sequence[torch.device],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The means of all tensors, and the levels of their sums, out of the owners' messages; of at most ``largest`` signs."""
        means: list[list[tuple[Piece, Tensor]]] = [[] for _ in shapes]
        levels: list[list[tuple[Piece, Tensor]]] = [[] for _ in shapes]
        replicas = 0
        for owner, bodies in self._mean_bodies(received, cuts, texts):
            pieces = cuts[owner]
            with _from(owner):
                agreed = _shared(scales, pieces)
                for piece, body, (_, scale), of in zip(pieces, bodies, agreed, known[owner], strict=True):
                    counts, senders = sums.unpack(body, of.count, largest=largest, known=of)
                    if replicas not in (0, senders):
                        raise PayloadError(
                            f"payload: sums of {senders} signs; those of other pieces are of {replicas}"
                        )
                    replicas = senders
                    mean = sums.mean(counts, senders, scale=scale, device=devices[piece.tensor])
                    means[piece.tensor].append((piece, mean))
                    level = torch.from_numpy(sums.levels_of(counts, senders))
                    levels[piece.tensor].append((piece, level))
        return (
            [
                assemble(of, shape, dtype=torch.float32, device=device)
                for of, shape, device in zip(means, shapes, devices, strict=True)
            ],
            [assemble(of, shape, dtype=torch.uint8) for of, shape in zip(levels, shapes, strict=True)],
        )


@contextmanager
def _from(owner: int) -> Iterator[None]:
    """Errors within name the owner whose message is read."""
    try:
        yield
    except PayloadError as error:
        raise PayloadError(f"from replica {owner}, the owner of part {owner}: {error}") from error


def _shared(scales: Tensor | None, pieces: Sequence[Piece]) -> list[tuple[bytes, float]]:
    """Of each piece: the bytes of its tensor's scale in bfloat16, and the number; none and 1 where no scale is shared."""
    if scales is None:
        return [(b"", 1.0)] * len(pieces)
    narrow = bfloat16.round_nearest(scales)
    numbers = narrow.tolist()
    return [(bfloat16.write(narrow[p.tensor : p.tensor + 1]), numbers[p.tensor]) for p in pieces]


def _residual(state: State, piece: Piece) -> Tensor | None:
    """What this replica keeps of earlier means of the piece; None where it did not own the same piece then."""
    kept = state.get(OWNER, {})
    residual: Tensor | None = kept.get("residual")
    same = (
        residual is not None and kept["begin"] == piece.begin and residual.numel() == piece.end - piece.begin
    )
    return residual if same else None


def _named(piece: Piece, context: Context) -> str:
    name = f" ({context.names[piece.tensor]})" if context.names else ""
    return f"entries {piece.begin} to {piece.end} of tensor {piece.tensor}{name}"
