"""The compressed exchange, with feedback."""

import math
import struct
import zlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import payload as payloads
from muonwire.codec.base import Codec, Drafts, Encoded, Mean
from muonwire.codec.finite import Checks
from muonwire.codec.host import CPU, length_of, send
from muonwire.codec.part import Shape
from muonwire.codec.quantize.scales import round_nearest
from muonwire.errors import PayloadError, UsageError
from muonwire.stages.base import Context, State, States, TalkingStage, Tensors
from muonwire.stages.damage import blame
from muonwire.stages.feedback import EF14, Feedback, NoFeedback
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.lengthen import lengthened
from muonwire.stages.owners import LAST, OWNER, SUMS, Owners, own_seed
from muonwire.stages.pieces import Piece, assembled
from muonwire.stages.rounds import Reply, Request, Rounds, at_once, read
from muonwire.transport.base import Flag

MEANS = ("gather", "lossless", "recompressed", "auto")
# With "auto" a gather may send so many times what owners would: it loses nothing and takes one message less.
_GATHER_MAY_COST = 1.1
# A matrix that codecs do not find too small for what they keep from round to round.
_LARGE = (4096, 4096)


def round_seed(*, step: int, index: int) -> int:
    """32 bits for one tensor in one round, the same on all replicas; neighbours share none of their pattern.

    >>> round_seed(step=1, index=0) != round_seed(step=2, index=0) != round_seed(step=1, index=1)
    True
    """
    return zlib.crc32(struct.pack("<QQ", step, index))


@dataclass(frozen=True, kw_only=True)
class Exchange(TalkingStage):
    """Encode each replica's signal, average what all replicas sent in rank order.

    u ← restore((1/R) Σᵣ decode(encode(signalᵣ))). The feedback makes the signal of the update, keeps a part of it, and has
    ``restore``, which is mostly the identity. All tensors of the group travel together.

    ``means`` says who averages:

    - "gather": every replica, what all have sent to it. A replica sends its update R − 1 times.
    - "lossless": each part of the tensors has an owner, to which all send theirs of it, and which sends all the mean. Of signs with
      one scale the sum is a whole number, which travels at its entropy, given the sum of the round before, of which all replicas
      keep a byte an entry: ½ log2(πe R / 2) bits where signs are independent. The result has the bits of "gather".
    - "recompressed": the owner sends the mean m of its part through ``mean_codec``, and keeps what that drops for the next round:
      u ← ρ u′ + decode(encode(m + decay · e − ρ u′)), e ← m + decay · e − u, with the decay of an EF14 feedback, else 1, and ρ
      ``mean_prediction`` of the last u, u′, which all replicas keep where ρ > 0. A replica sends two updates' worth at any R.
    - "auto": by R alone, "gather" where it sends at most a tenth more than owners would, else "lossless" where the codec allows
      it, else "recompressed" where it allows that. It is decided anew when replicas join or leave.

    Where the replicas share a tensor's scale (``sign(scale=shared)``), it is the mean of their mean magnitudes, agreed first.

    With ``lengthen`` the mean, which is shorter than what replicas send where they disagree, gets their length, tensor by tensor:
    u ← u · ℓ / ‖u‖_F, ℓ the mean norm of what replicas sent, times √F where each sends one of F parts in turns, for the whole
    tensor. With "gather" all replicas find ℓ in the payloads, and of signs with one scale for all in that scale; with
    "recompressed" they agree on it first, 4 bytes a tensor.

    What an owner keeps belongs to its part. Where the parts move, since replicas join or leave, or their owner is lost, it begins
    with zero again: the error of one round's mean is lost then, as is the residual of a replica that leaves.

    Args:
        codec: how a signal becomes bytes.
        feedback: what is encoded and what is kept. Default: the update itself, nothing kept.
        over: "replicas" divides by their number; "senders" divides each entry by the number of replicas whose selection
            holds it, as DeMo does. Default: "replicas".
        means: "gather", "lossless", "recompressed" or "auto". Default: "gather".
        mean_codec: of owners' means with "recompressed". It keeps no state from round to round. Default: ``codec``.
        mean_prediction: ρ, in [0, 1]: how much of the last mean the next one is expected to be, with "recompressed". With 1 and
            decay 0 it is EF21's feedback. For codecs that send every entry. Default: 0, at which nothing is kept.
        lengthen: give the mean the length that replicas' own signals have. Default: False.

    Raises:
        UsageError: an unknown ``over`` or ``means``, a ``mean_prediction`` outside [0, 1], "senders" with a feedback that needs the
            mean over all replicas, ``lengthen`` with a feedback that restores more than the mean, or a codec that does not suit
            the means.

    Source: means by owners: Tang et al., "1-bit Adam", arXiv 2102.02888, section 4; compressed both ways: MuLoCo, arXiv 2505.23725;
    what has changed: Richtárik et al., "EF21", arXiv 2106.05203, section 3.
    """

    codec: Codec
    feedback: Feedback = NoFeedback()
    over: str = "replicas"
    means: str = "gather"
    mean_codec: Codec | None = None
    mean_prediction: float = 0.0
    lengthen: bool = False

    def __post_init__(self) -> None:
        if self.over not in ("replicas", "senders"):
            raise UsageError(f"exchange: over is {self.over!r}; allowed are replicas and senders")
        if self.over == "senders" and self.feedback.needs_replicas:
            raise UsageError(
                f"exchange: {self.feedback} needs the mean over all replicas; leave over=senders out"
            )
        if self.means not in MEANS:
            raise UsageError(f"exchange: means is {self.means!r}; allowed are {', '.join(MEANS)}")
        if self.mean_codec is not None and self.means not in ("recompressed", "auto"):
            raise UsageError(
                f"exchange: mean_codec is {self.mean_codec} with means={self.means}; it is for means=recompressed and auto"
            )
        if not 0 <= self.mean_prediction <= 1:
            raise UsageError(f"exchange: mean_prediction is {self.mean_prediction:g}; allowed is 0 to 1")
        if self.mean_prediction and self.means not in ("recompressed", "auto"):
            raise UsageError(
                f"exchange: mean_prediction is {self.mean_prediction:g} with means={self.means}; it is for means=recompressed "
                "and auto"
            )
        if self.lengthen and not isinstance(self.feedback, NoFeedback | EF14):
            raise UsageError(
                f"exchange: lengthen=True with the feedback {self.feedback}, which makes more than the mean of it; it is for EF14 "
                "and NoFeedback"
            )
        if self.means == "lossless" and not self.codec.counts_signs:
            raise UsageError(
                f"exchange: means=lossless with the codec {self.codec}; it needs one sign an entry and a scale that all share, "
                "as sign(scale=shared) or sign(scale=none); for other codecs take means=recompressed"
            )
        if self._recompresses is None and (self.means == "recompressed" or self.mean_codec is not None):
            raise UsageError(
                f"exchange: means={self.means} with means through {self.mean_codec or self.codec}, which keeps a state of "
                "whole tensors from round to round, or sends a part in turns; give another mean_codec, such as float32, or "
                "take means=gather"
            )

    @cached_property
    def _recompresses(self) -> Codec | None:
        """The codec of owners' means; None where it keeps a state, or sends a part of what there is."""
        codec = self.mean_codec or self.codec
        return None if codec.init(_LARGE) or codec.takes_turns else codec

    def _of(self, replicas: int) -> "Exchange":
        """The exchange of so many replicas, by its codec's word."""
        codec = self.codec.for_replicas(replicas)
        return self if codec is self.codec else replace(self, codec=codec)

    @cached_property
    @override
    def replaces_states(self) -> bool:
        return self.feedback.replaces_states and not self.codec.init(_LARGE)

    @property
    @override
    def needs_same_replicas(self) -> str:
        return self.feedback.needs_same_replicas

    @property
    @override
    def multiplies(self) -> bool:
        return not self.codec.exact or not (self.mean_codec or self.codec).exact

    @property
    @override
    def reads_params(self) -> bool:
        return False

    @override
    def init(self, param: Tensor) -> State:
        """The feedback's state, the codec's if it keeps one, and what an owner keeps, or all of sums, nothing at first."""
        kept = {k: send(v, param.device) for k, v in self.codec.init(tuple(param.shape)).items()}
        owned: State = {}
        if self.means in ("recompressed", "auto") and self._recompresses:
            owned = {OWNER: {}} | ({LAST: {}} if self.mean_prediction else {})
        if self.means in ("lossless", "auto") and self.codec.counts_signs:
            owned = {SUMS: {}}
        return self.feedback.init(param) | ({"codec": kept} if kept else {}) | owned

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """What the feedback says, and the sums; the codec's state is the sender's, and what an owner keeps its own."""
        if alike:
            return {key: value for key, value in state.items() if key != OWNER}
        return {key: state[key] for key in (*self.feedback.shared, SUMS, LAST) if key in state}

    def form(self, shapes: tuple[Shape, ...], replicas: int) -> str:
        """How the means are made: ``means``, decided by the number of replicas where it is "auto"."""
        if self.means != "auto":
            return self.means
        form = "lossless" if self.codec.counts_signs else "recompressed" if self._recompresses else "gather"
        if form == "gather" or replicas == 1:
            return "gather"
        # What leaves a replica: a gather's payload for each peer; of owners R − 1 parts, and 1/R of the means for each peer.
        owners = self._owners(form)
        there_and_back = (replicas - 1) / replicas * sum(owners.total_bytes(shapes, replicas))
        gathered = (replicas - 1) * self.codec.estimate_bytes(*shapes)
        return "gather" if gathered <= _GATHER_MAY_COST * there_and_back else form

    def owners(self, shapes: tuple[Shape, ...], replicas: int) -> Owners | None:
        """Who averages the parts, with so many replicas; None with a gather, where every replica averages all."""
        exchange = self._of(replicas)
        form = exchange.form(shapes, replicas)
        return None if form == "gather" else exchange._owners(form)

    def _owners(self, form: str) -> Owners:
        decay = self.feedback.decay if isinstance(self.feedback, EF14) else 1.0
        return Owners(
            codec=self.codec,
            mean_codec=None if form == "lossless" else self._recompresses,
            over=self.over,
            decay=decay,
            prediction=self.mean_prediction,
        )

    @override
    def estimate_bytes(self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int) -> float:
        """The payload of all tensors, its header included; with owners R − 1 parts and a mean; and shared scales."""
        if (exchange := self._of(replicas)) is not self:
            return exchange.estimate_bytes(params, layouts, replicas=replicas)
        shapes = tuple(tuple(p.shape) for p in params)
        form = self.form(shapes, replicas)
        agreed = 4 * (len(shapes) + -len(shapes) % replicas)
        scales = agreed if self.codec.shares_scale else 0
        if form == "gather":
            return float(scales + self.codec.estimate_bytes(*shapes))
        if self.lengthen and not self.codec.counts_signs:
            scales += agreed
        return scales + self._owners(form).estimate_bytes(shapes, replicas)

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        """One round for the shared scales, where there are any; then one of a gather, or two of owners."""
        if (exchange := self._of(context.transport.world_size)) is not self:
            return (yield from exchange.rounds(updates, params, states, context))
        drafts = Drafts()
        signals = self._signals(updates, states, context, drafts)
        scales = None
        if self.codec.shares_scale:
            signals = list(signals)
            found = yield from read([self.codec.scale_of(s) for s in signals])
            own = [float(scale[0]) for scale in found]
            if not all(map(math.isfinite, own)):
                context.transport.requested |= Flag.DIVERGED
            finite = [s if math.isfinite(s) else 0.0 for s in own]
            agreed = yield Request(tensors=[torch.tensor(finite, device=CPU)])
            (scales,) = agreed.tensors
        shapes = tuple(tuple(u.shape) for u in updates)
        form = self.form(shapes, context.transport.world_size)
        if form == "gather":
            payload = yield from self._encode(signals, states, scales, context, drafts)
            reply = yield Request(payload=payload)
            return (yield from self._receive(reply, params, states, context))
        owners = self._owners(form)
        sent: list[Tensor] = []
        bodies = yield from self._encode_pieces(
            owners, signals, shapes, states, scales, context, drafts, sent
        )
        lengths = None
        if self.lengthen:
            lengths = yield from self._agreed_lengths(sent, shapes, scales, context)
        devices = [p.device for p in params]
        means = yield from owners.rounds(bodies, shapes, scales, states, context, devices)
        return (
            yield from self._updates(None, [Mean(mean) for mean in means], lengths, params, states, context)
        )

    @override
    def send(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Request:
        """The payload of a gather: encode the signals and keep what is not sent."""
        if (exchange := self._of(context.transport.world_size)) is not self:
            return exchange.send(updates, params, states, context)
        drafts = Drafts()
        signals = self._signals(updates, states, context, drafts)
        return Request(payload=at_once(self._encode(signals, states, None, context, drafts)))

    def _signals(
        self, updates: Tensors, states: States, context: Context, drafts: Drafts
    ) -> Iterable[Tensor]:
        """What is to be sent of each tensor, made when it is asked for; zeros where the host sees now that it is not finite."""
        for update, state in zip(updates, states, strict=True):
            signal = self.feedback.signal(update, state, context)
            if not drafts.checks.add(signal):
                context.transport.requested |= Flag.DIVERGED
                signal = torch.zeros_like(signal)
            yield signal

    def _encode(
        self,
        signals: Iterable[Tensor],
        states: States,
        scales: Tensor | None,
        context: Context,
        drafts: Drafts,
    ) -> Generator[Request, Reply, bytes]:
        """One payload of all signals."""
        kinds = []
        for i, (signal, state) in enumerate(zip(signals, states, strict=True)):
            one = self.codec.encode_body(
                signal,
                seed=self._seed(context, i),
                state=_state(state, scales, i),
            )
            drafts.add(one)
            self._keep(signal, one, state, context)
            kinds.append((tuple(signal.shape), signal.dtype))
        bodies = yield from self._written(drafts, context)
        for i, (shape, dtype) in enumerate(kinds):
            if not bodies[i]:
                zeros = torch.zeros(shape, dtype=dtype, device=CPU)
                seed = self._seed(context, i)
                bodies[i] = [self.codec.encode_body(zeros, seed=seed, state=_state({}, scales, i)).body]
        entries = [(*kind, of_tensor[0]) for kind, of_tensor in zip(kinds, bodies, strict=True)]
        return payloads.pack(str(self.codec), entries)

    def _seed(self, context: Context, index: int) -> int:
        """Of one tensor in this round, on this replica."""
        return own_seed(
            self.codec, round_seed(step=context.step, index=context.place(index)), context.transport.rank
        )

    def _written(self, drafts: Drafts, context: Context) -> Generator[Request, Reply, list[list[bytes]]]:
        """By tensor: the bodies of its pieces; none where the tensor is not finite.

        The other replicas wait for its payload: it holds zeros, and the header of its message says why.
        """
        bodies = drafts.write((yield from read(drafts.values)))
        if None in bodies:
            context.transport.requested |= Flag.DIVERGED
        return [of_tensor or [] for of_tensor in bodies]

    def _encode_pieces(
        self,
        owners: Owners,
        signals: Iterable[Tensor],
        shapes: tuple[Shape, ...],
        states: States,
        scales: Tensor | None,
        context: Context,
        drafts: Drafts,
        lengths: list[Tensor],
    ) -> Generator[Request, Reply, list[list[bytes]]]:
        """By owner: the bodies of its pieces of all signals; adds to ``lengths`` that of each tensor as it is sent."""
        cuts = owners.pieces(shapes, context.transport.world_size)
        by_tensor: list[list[tuple[int, Piece]]] = [[] for _ in shapes]
        for owner, pieces in enumerate(cuts):
            for piece in pieces:
                by_tensor[piece.tensor].append((owner, piece))
        for i, (signal, state, of_tensor) in enumerate(zip(signals, states, by_tensor, strict=True)):
            encoded = owners.encode(signal, of_tensor, context, state=_state(state, scales, i))
            drafts.add(*(part for _, part in encoded))
            whole = assembled(encoded, signal)
            if self.lengthen and not self.codec.counts_signs:
                share = self._turn_share([piece.end - piece.begin for _, piece in of_tensor])
                lengths.append(length_of(whole.decoded) / math.sqrt(share))
            self._keep(signal, whole, state, context)
        written = yield from self._written(drafts, context)
        bodies: list[list[bytes]] = [[] for _ in cuts]
        for i, (of_tensor, found) in enumerate(zip(by_tensor, written, strict=True)):
            if of_tensor and not found:
                zeros = torch.zeros(shapes[i], device=CPU)
                again = owners.encode(zeros, of_tensor, context, state=_state({}, scales, i))
                found = [part.body for _, part in again]
            for (owner, _), body in zip(of_tensor, found, strict=True):
                bodies[owner].append(body)
        return bodies

    def _turn_share(self, sizes: Sequence[int]) -> float:
        """The share of a tensor in pieces of these sizes that is sent, where replicas take turns."""
        numel = sum(sizes)
        return sum(self.codec.turn_share(n) * n for n in sizes) / numel if numel else 1.0

    def _agreed_lengths(
        self, own: Sequence[Tensor], shapes: Sequence[Shape], scales: Tensor | None, context: Context
    ) -> Generator[Request, Reply, list[list[Tensor]]]:
        """By tensor: the length of what is sent, the mean over the replicas where they share no scale."""
        if self.codec.counts_signs:
            roots = torch.tensor([math.prod(shape) for shape in shapes], dtype=torch.float64).sqrt()
            size = torch.ones(1) if scales is None else round_nearest(scales)
            return [[length] for length in (roots * size.double()).unbind()]
        found = yield from read(own)
        sizes = [float(length[0]) for length in found]
        if not all(map(math.isfinite, sizes)):
            context.transport.requested |= Flag.DIVERGED
        agreed = yield Request(tensors=[torch.tensor([s if math.isfinite(s) else 0.0 for s in sizes])])
        return [[length] for length in agreed.tensors[0].double().unbind()]

    def _keep(self, signal: Tensor, encoded: Encoded, state: State, context: Context) -> None:
        # ``signal`` may be the residual itself, from which ``keep`` takes what was sent.
        whole = signal.clone() if context.watch is not None else signal
        self.feedback.keep(encoded, state)
        if context.watch is not None and not isinstance(self.feedback, NoFeedback):
            context.watch(whole, state["residual"] if "residual" in state else whole - encoded.decoded)

    @override
    def receive(self, reply: Reply, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """Check every replica's payload and average the tensors."""
        if (exchange := self._of(context.transport.world_size)) is not self:
            return exchange.receive(reply, params, states, context)
        return at_once(self._receive(reply, params, states, context))

    def _receive(self, reply: Reply, params: Tensors, states: States, context: Context) -> Rounds:
        shapes = tuple(tuple(p.shape) for p in params)
        # A payload names its codec.
        devices = tuple(p.device for p in params)
        key = (self.over, self.lengthen, shapes, devices, tuple(reply.payloads))
        bodies, means, lengths = context.transport.once(
            key, lambda: self._decode(reply.payloads, shapes, devices)
        )
        return (yield from self._updates(bodies, means, lengths, params, states, context))

    def _decode(
        self, received: Sequence[bytes], shapes: Sequence[Shape], devices: Sequence[torch.device]
    ) -> tuple[list[list[bytes]], list[Mean | None], list[list[Tensor]] | None]:
        """By tensor: the replicas' bodies in rank order, their mean, None where one of them is damaged, and their lengths."""
        by_rank = []
        for rank, payload in enumerate(received):
            try:
                by_rank.append(payloads.unpack(payload, codec_text=str(self.codec), shapes=shapes))
            except PayloadError as error:
                raise PayloadError(f"from replica {rank}: {error}") from error
        bodies = [[entries[i].body for entries in by_rank] for i in range(len(shapes))]
        means: list[Mean | None] = []
        lengths: list[list[Tensor]] | None = [] if self.lengthen else None
        for of_tensor, shape, device in zip(bodies, shapes, devices, strict=True):
            try:
                means.append(self.codec.bounded_mean(of_tensor, shape, over=self.over, device=device))
            except PayloadError:
                means.append(None)
                continue
            if lengths is not None:
                of_whole = math.sqrt(self._turn_share([math.prod(shape)]))
                lengths.append(
                    [self.codec.length(body, shape, device=device) / of_whole for body in of_tensor]
                )
        return bodies, means, lengths

    def _updates(
        self,
        bodies: Sequence[Sequence[bytes]] | None,
        means: Sequence[Mean | None],
        lengths: Sequence[Sequence[Tensor]] | None,
        params: Tensors,
        states: States,
        context: Context,
    ) -> Rounds:
        """The updates that the means make; ``bodies`` are all replicas' by tensor, None where owners averaged them.

        ``lengths`` are what the means are lengthened by.
        """
        updates: list[Tensor] = []
        checks = Checks()
        replicas = len(bodies[0]) if bodies else context.transport.world_size
        for i, (mean, param, state) in enumerate(zip(means, params, states, strict=True)):
            if mean is None:
                break
            # A copy: what follows in the chain may change it.
            copy, bound = mean.values.to(param.device, copy=True), mean.bound
            if lengths is not None:
                copy = lengthened(copy, lengths[i], replicas=replicas)
                # By the fourth root of their number at most.
                bound *= replicas
            updates.append(self.feedback.restore(copy, state).to(param.dtype))
            # Bounds leave the rounding out.
            if not self.feedback.restores and bound < torch.finfo(param.dtype).max / 2:
                checks.add_finite()
            else:
                checks.add(updates[-1])
        finite = checks.results((yield from read(checks.sums)))
        if len(updates) == len(params) and all(finite):
            return updates
        index = finite.index(False) if False in finite else len(updates)
        param = params[index]
        name = f" ({context.names[index]})" if context.names else ""
        what = f"tensor {index}{name} of shape {tuple(param.shape)}"
        if bodies is None:
            raise PayloadError(
                f"{what}: the owners' means do not make an update that is finite in {param.dtype}"
            )
        raise blame(self.codec, bodies[index], tuple(param.shape), dtype=param.dtype, what=what)

    def __str__(self) -> str:
        senders = ", over=senders" if self.over == "senders" else ""
        feedback = "" if isinstance(self.feedback, NoFeedback) else f", {self.feedback}"
        means = "" if self.means == "gather" else f", means={self.means}"
        mean_codec = "" if self.mean_codec is None else f", mean_codec={self.mean_codec}"
        lengthen = ", lengthen" if self.lengthen else ""
        return f"exchange({self.codec}{feedback}{senders}{means}{mean_codec}{lengthen})"


def _state(state: State, scales: Tensor | None, index: int) -> State | None:
    """What the codec gets of tensor ``index``: its own state, or the scale that the replicas share."""
    return state.get("codec") if scales is None else {"scale": scales[index]}
