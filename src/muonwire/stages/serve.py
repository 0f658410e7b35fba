"""A stage that one replica computes for all others."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec import payload as payloads
from muonwire.codec.base import Codec, Drafts
from muonwire.codec.finite import each_finite
from muonwire.codec.host import CPU, fetch
from muonwire.errors import PayloadError, UsageError
from muonwire.stages.base import Context, Stage, State, States, TalkingStage, Tensors
from muonwire.stages.damage import decode_alone
from muonwire.stages.exchange import round_seed
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request
from muonwire.transport.base import Flag


@dataclass(frozen=True, kw_only=True)
class Serve(TalkingStage):
    """u ← decode(encode(stage(u))), computed by the replica that owns the tensor and sent to the others.

    All replicas, the owner too, continue from the decoded payload, so that they stay bit-identical even on different processors,
    whose matrix products round differently. The computation costs the owner's time only, but the full update goes over the
    link. The owner alone keeps the stage's state.

    Args:
        stage: what the owner computes; it must not talk, and must treat each tensor by itself.
        codec: how its results travel. It keeps no state from round to round.
        owners: "one": replica 0 owns all tensors; "all": tensor i of the group belongs to replica i mod R. Default: "one".

    Raises:
        UsageError: an unknown ``owners``.

    Source: approach B of the note “Why Muon and DisTrO conflict”, whose server orthogonalizes.
    """

    stage: Stage
    codec: Codec
    owners: str = "one"

    def __post_init__(self) -> None:
        assert not self.stage.talks
        if self.owners not in ("one", "all"):
            raise UsageError(f"serve: owners is {self.owners!r}; allowed are one and all")

    @property
    @override
    def needs_same_replicas(self) -> str:
        return "the state of a tensor is lost with its owner"

    @property
    @override
    def multiplies(self) -> bool:
        return not self.codec.exact

    @property
    @override
    def reads_params(self) -> bool:
        return self.stage.reads_params

    @override
    def init(self, param: Tensor) -> State:
        return self.stage.init(param)

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        self.stage.prepare(state, param, layout)

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """Nothing: only the owner's moves."""
        return {}

    @override
    def estimate_bytes(self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int) -> float:
        """Each tensor is sent once; a replica that owns none sends an empty payload; the mean over the replicas."""
        shapes = [tuple(p.shape) for p in params]
        by_rank = [self._owned(rank, len(shapes), replicas) for rank in range(replicas)]
        return fmean(self.codec.estimate_bytes(*(shapes[i] for i in owned)) for owned in by_rank)

    def _owned(self, rank: int, count: int, world_size: int) -> range:
        """The tensors of ``rank``."""
        if self.owners == "all":
            return range(rank, count, world_size)
        return range(count if rank == 0 else 0)

    @override
    def send(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Request:
        """Compute and encode the tensors that this replica owns; a replica without any sends an empty payload."""
        transport = context.transport
        owned = self._owned(transport.rank, len(updates), transport.world_size)
        results = self.stage.apply_to_some(owned, updates, params, states, context)
        drafts = Drafts()
        seeds = [round_seed(step=context.step, index=context.place(i)) for i in owned]
        for seed, result in zip(seeds, results, strict=True):
            sent = result if drafts.checks.add(result) else torch.zeros_like(result)
            drafts.add(self.codec.encode_body(sent, seed=seed))
        entries = []
        for seed, result, bodies in zip(seeds, results, drafts.write(fetch(drafts.values)), strict=True):
            shape, dtype = tuple(result.shape), result.dtype
            if bodies is None:
                # The other replicas wait for this payload: it holds zeros, and the header of its message says why.
                transport.requested |= Flag.DIVERGED
                bodies = [self.codec.encode_body(torch.zeros(shape, dtype=dtype, device=CPU), seed=seed).body]
            entries.append((shape, dtype, bodies[0]))
        return Request(payload=payloads.pack(str(self.codec), entries))

    @override
    def receive(self, reply: Reply, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """Check and decode every owner's payload."""
        results: dict[int, Tensor] = {}
        bodies: dict[int, bytes] = {}
        for rank, payload in enumerate(reply.payloads):
            owned = self._owned(rank, len(params), len(reply.payloads))
            shapes = [tuple(params[i].shape) for i in owned]
            try:
                entries = payloads.unpack(payload, codec_text=str(self.codec), shapes=shapes)
                for i, entry in zip(owned, entries, strict=True):
                    decoded = self.codec.decode_body(entry.body, entry.shape, device=params[i].device)
                    results[i], bodies[i] = decoded.to(params[i].dtype), entry.body
            except PayloadError as error:
                raise PayloadError(f"from replica {rank}: {error}") from error
        for i, finite in zip(results, each_finite(list(results.values())), strict=True):
            if not finite:
                rank = i % len(reply.payloads) if self.owners == "all" else 0
                try:
                    decode_alone(self.codec, bodies[i], tuple(params[i].shape), dtype=params[i].dtype)
                except PayloadError as error:
                    raise PayloadError(f"from replica {rank}: {error}") from error
        return [results[i] for i in range(len(params))]

    def __str__(self) -> str:
        return f"serve({self.stage}, codec={self.codec}, owners={self.owners})"
