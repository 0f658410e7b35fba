"""The exchange that all replicas take part in at once: flags, the handshake before it, and the weights moving after it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from muonwire.optim import sharded
from muonwire.optim.agreement import Handshake, Shaken, buffer_means
from muonwire.optim.inside import average_buffers, told_by_site
from muonwire.optim.kept import MASTER, SHARED, copy_out
from muonwire.optim.passes import Pass, inner_passes, outer_passes, restored_on_error
from muonwire.stages.rounds import drive
from muonwire.transport.base import Flag, SingleReplica, Transport
from muonwire.transport.digest import check_replicas, digest
from muonwire.transport.mesh import MeshTransport
from muonwire.transport.shards import is_sharded

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer


def exchange(optimizer: "ChainOptimizer", passes: Sequence[Pass], problem: str | None) -> None:
    """Run all passes with shared messages, one for each exchange along the longest chain; then move the weights."""

    def settle() -> None:
        optimizer.transport.settle()
        raise_if_flagged(optimizer, problem)

    with told_by_site(optimizer.transport), restored_on_error(passes):
        updates = updates_of(passes, optimizer.transport, optimizer.transport, settle)
    for p, moved in zip(passes, updates, strict=True):
        p.move(moved)


def updates_of(
    passes: Sequence[Pass],
    transport: Transport,
    talking: Transport,
    settle: Callable[[], None] = lambda: None,
) -> list[list[Tensor]]:
    """Run the passes' chains together; on this process's shards where weights are sharded.

    Args:
        passes: whose chains these are.
        transport: of the optimizer.
        talking: to the other replicas, as in the passes' contexts.
        settle: called after the messages of each round. Default: nothing.
    """
    if isinstance(transport, MeshTransport) and any(is_sharded(q) for p in passes for q in p.params):
        return sharded.run(passes, transport, talking, settle)
    return drive([p.rounds() for p in passes], talking, settle)


def step_alone(optimizer: "ChainOptimizer") -> None:
    """A step of this replica's own; group by group, or where weights are sharded with the shards of all in the same messages."""
    passes = inner_passes(optimizer)
    for together in [passes] if optimizer.transport.shards_inside else [[p] for p in passes]:
        found = updates_of(together, optimizer.transport, SingleReplica())
        for p, updates in zip(together, found, strict=True):
            p.move(updates)


def raise_if_flagged(optimizer: "ChainOptimizer", problem: str | None) -> None:
    """Act on the flags in the headers of the last messages; all replicas do the same."""
    transport, agreed = optimizer.transport, optimizer.transport.agreed
    ours = Flag.DIVERGED | Flag.CHANGED
    transport.requested &= ~ours
    transport.agreed &= ~ours
    if Flag.CHANGED in agreed:
        check_replicas(optimizer.shared(), transport)
    if Flag.DIVERGED in agreed:
        raise optimizer._not_finite(
            problem or "a loss, a gradient or an update is not finite on at least one replica"
        )


def averaged_buffers(optimizer: "ChainOptimizer", shaken: Shaken) -> list[tuple[Tensor, Tensor]]:
    """The buffers that differ between the replicas, each with its mean."""
    if not shaken.differing:
        return []
    transport = optimizer.transport
    return transport.as_one(lambda: buffer_means(optimizer.buffers(), shaken.differing, transport))


def shake_hands(optimizer: "ChainOptimizer") -> Shaken:
    """Check that all replicas can synchronize, before anything changes."""
    average_buffers(optimizer)
    if optimizer.transport.world_size == 1:
        return Shaken()
    handshake = Handshake(
        alone=optimizer.steps_alone,
        edits=optimizer.agreement.edits,
        buffers=[digest(buffer) for _, buffer in optimizer.buffers()],
        spell=b"" if optimizer.adapting is None else optimizer.adapting.spell(),
    )

    def shake() -> Shaken:
        shaken = handshake.exchange(optimizer.transport)
        optimizer.agreement.forget_edits()
        raise_if_flagged(optimizer, optimizer._failure)
        return shaken

    return optimizer.transport.as_one(shake)


def exchange_changes(optimizer: "ChainOptimizer", shaken: Shaken) -> None:
    """Δ = a − w through the outer chains; a ← a − outer_lr · Δ̄; w ← a; the next interval begins."""
    optimizer.before_exchange()
    means = averaged_buffers(optimizer, shaken)
    exchange(optimizer, outer_passes(optimizer), None)
    params = optimizer.trained()
    copy_out(params, optimizer.state, SHARED)
    for state in (optimizer.state[p] for p in params):
        if MASTER in state:
            state[MASTER].copy_(state[SHARED])
    for buffer, mean in means:
        buffer.copy_(mean)
    for group in optimizer.param_groups:
        group["synchronized_step"] = group["step"]
    optimizer._count(synchronizations=1)
    if optimizer.adapting is not None:
        optimizer.adapting.note(list(shaken.spells))
        optimizer.adapting.begin()
    optimizer.record_weights()
    optimizer.after_exchange()
