"""The compressed exchange, with feedback."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import payload as payloads
from muonwire.codec.base import Codec
from muonwire.codec.finite import all_finite
from muonwire.errors import PayloadError, UsageError
from muonwire.stages.base import Context, State, States, TalkingStage, Tensors
from muonwire.stages.feedback import Feedback, NoFeedback
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request
from muonwire.transport.base import Flag


def round_seed(*, step: int, index: int) -> int:
    """32 bits for one tensor in one round, the same on all replicas; neighbours share none of their pattern.

    >>> round_seed(step=1, index=0) != round_seed(step=2, index=0) != round_seed(step=1, index=1)
    True
    """
    return zlib.crc32(struct.pack("<QQ", step, index))


@dataclass(frozen=True, kw_only=True)
class Exchange(TalkingStage):
    """Encode each replica's signal, gather all payloads, decode and average them in rank order.

    u ← restore((1/R) Σᵣ decode(encode(signalᵣ))). The feedback makes the signal of the update, keeps a part of it, and has
    ``restore``, which is mostly the identity. All tensors of the group travel in one payload.

    Args:
        codec: how a signal becomes bytes.
        feedback: what is encoded and what is kept. Default: the update itself, nothing kept.
        over: "replicas" divides by their number; "senders" divides each entry by the number of replicas whose selection
            holds it, as DeMo does. Default: "replicas".

    Raises:
        UsageError: an unknown ``over``, or "senders" with a feedback that needs the mean over all replicas.
    """

    codec: Codec
    feedback: Feedback = NoFeedback()
    over: str = "replicas"

    def __post_init__(self) -> None:
        if self.over not in ("replicas", "senders"):
            raise UsageError(f"exchange: over is {self.over!r}; allowed are replicas and senders")
        if self.over == "senders" and self.feedback.needs_replicas:
            raise UsageError(
                f"exchange: {self.feedback} needs the mean over all replicas; leave over=senders out"
            )

    @cached_property
    @override
    def replaces_states(self) -> bool:
        return self.feedback.replaces_states and not self.codec.init((4, 4))

    @property
    @override
    def needs_same_replicas(self) -> str:
        return self.feedback.needs_same_replicas

    @override
    def init(self, param: Tensor) -> State:
        """The feedback's state, and the codec's if it keeps one."""
        kept = self.codec.init(tuple(param.shape))
        return self.feedback.init(param) | ({"codec": kept} if kept else {})

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """What the feedback says; the codec's state is the sender's."""
        return state if alike else {key: state[key] for key in self.feedback.shared if key in state}

    @override
    def estimate_bytes(self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int) -> float:
        """The payload of all tensors, its header included."""
        return float(self.codec.estimate_bytes(*(tuple(p.shape) for p in params)))

    @override
    def send(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Request:
        """Encode the signals and keep what is not sent."""
        entries = []
        for i, (update, state) in enumerate(zip(updates, states, strict=True)):
            signal = self.feedback.signal(update, state, context)
            if not all_finite(signal):
                # The other replicas wait for this payload: it holds zeros, and the header of its message says why.
                context.transport.requested |= Flag.DIVERGED
                signal = torch.zeros_like(signal)
            encoded = self.codec.encode_body(
                signal, seed=round_seed(step=context.step, index=i), state=state.get("codec")
            )
            # ``signal`` may be the residual itself, from which ``keep`` takes what was sent.
            whole = signal.clone() if context.watch is not None else signal
            self.feedback.keep(encoded, state)
            if context.watch is not None and not isinstance(self.feedback, NoFeedback):
                context.watch(whole, state["residual"] if "residual" in state else whole - encoded.decoded)
            entries.append((tuple(signal.shape), signal.dtype, encoded.body))
        return Request(payload=payloads.pack(str(self.codec), entries))

    @override
    def receive(self, reply: Reply, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """Check every replica's payload and average the tensors."""
        shapes = tuple(tuple(p.shape) for p in params)
        # A payload names its codec.
        key = (self.over, shapes, tuple(reply.payloads))
        bodies, means = context.transport.once(key, lambda: self._decode(reply.payloads, shapes))
        return [
            self._update(i, bodies[i], means[i], param, state, context)
            for i, (param, state) in enumerate(zip(params, states, strict=True))
        ]

    def _decode(
        self, received: Sequence[bytes], shapes: Sequence[tuple[int, ...]]
    ) -> tuple[list[list[bytes]], list[Tensor | None]]:
        """By tensor: the replicas' bodies in rank order, and their mean, None where one of them is damaged."""
        by_rank = []
        for rank, payload in enumerate(received):
            try:
                by_rank.append(payloads.unpack(payload, codec_text=str(self.codec), shapes=shapes))
            except PayloadError as error:
                raise PayloadError(f"from replica {rank}: {error}") from error
        bodies = [[entries[i].body for entries in by_rank] for i in range(len(shapes))]
        means: list[Tensor | None] = []
        for of_tensor, shape in zip(bodies, shapes, strict=True):
            try:
                means.append(self.codec.mean_bodies(of_tensor, shape, over=self.over))
            except PayloadError:
                means.append(None)
        return bodies, means

    def _update(
        self,
        index: int,
        bodies: Sequence[bytes],
        mean: Tensor | None,
        param: Tensor,
        state: State,
        context: Context,
    ) -> Tensor:
        """The update of tensor ``index`` of the group."""
        name = f" ({context.names[index]})" if context.names else ""
        what = f"tensor {index}{name} of shape {tuple(param.shape)}"
        update = None
        if mean is not None:
            # A copy: what follows in the chain may change it.
            update = self.feedback.restore(mean.to(param.device, copy=True), state).to(param.dtype)
        if update is None or not all_finite(update):
            # Each body is decoded by itself only here, to name the replica that sent the bad one.
            peaks = self._peaks(bodies, param, what)
            rank = peaks.index(max(peaks))
            raise PayloadError(
                f"from replica {rank}: {what}: its values, up to {peaks[rank]:g}, are the largest in a sum over the replicas that "
                f"is not finite in {param.dtype}"
            )
        return update

    def _peaks(self, bodies: Sequence[bytes], param: Tensor, what: str) -> list[float]:
        """The largest magnitude of each replica's tensor; the first body that is no finite tensor raises, with its rank."""
        peaks = []
        for rank, body in enumerate(bodies):
            try:
                decoded = self.codec.decode_body(body, tuple(param.shape)).to(param.dtype)
                if not all_finite(decoded):
                    raise PayloadError(f"payload: a decoded value is not finite in {param.dtype}")
            except PayloadError as error:
                raise PayloadError(f"from replica {rank}: {what}: {error}") from error
            peaks.append(decoded.abs().max().item() if decoded.numel() else 0.0)
        return peaks

    def __str__(self) -> str:
        senders = ", over=senders" if self.over == "senders" else ""
        feedback = "" if isinstance(self.feedback, NoFeedback) else f", {self.feedback}"
        return f"exchange({self.codec}{feedback}{senders})"
