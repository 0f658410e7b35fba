"""Fragments on their way: what was sent, the exchange that a channel does of it, and what it comes to."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonwire.optim.agreement import Handshake, Shaken, buffer_means
from muonwire.optim.gradients import not_finite
from muonwire.optim.inside import told_by_site
from muonwire.optim.passes import Pass, restored_on_error
from muonwire.stages.rounds import drive
from muonwire.transport.base import Flag, Transport
from muonwire.transport.channel import Work
from muonwire.transport.meter import Traffic


@dataclass(frozen=True)
class Arrived:
    """What an exchange came to: an update for each parameter, means of buffers by name, and what the replicas told of waiting."""

    updates: list[tuple[Tensor, Tensor]]
    buffers: dict[str, Tensor]
    spells: list[bytes]


@dataclass
class Flight:
    """Fragments on their way.

    Args:
        fragments: that were sent together.
        sent_before: the steps in which each was sent before.
        last: the last step in which they can be merged.
        merge_at: the step in which they are; 0: not agreed yet.
        announced: where replicas agree on that step: the one that this replica has proposed. 0: none yet.
        agreed: flags of the replicas' messages.
    """

    fragments: list[int]
    sent_before: list[int]
    last: int
    merge_at: int = 0
    announced: int = 0
    agreed: Flag = Flag.NONE
    work: Work[Arrived] | None = None
    landed: bool = False
    error: Exception | None = None


@torch.no_grad()
def exchange(
    passes: Sequence[Pass],
    transport: Transport,
    handshake: Handshake | None,
    buffers: Sequence[tuple[str, Tensor]],
    problem: str | None,
) -> Arrived:
    """Shake hands and send the passes through their chains; where anything is raised, the states are what they were."""

    def check() -> None:
        agreed, transport.agreed = transport.agreed, transport.agreed & ~Flag.DIVERGED
        transport.requested &= ~Flag.DIVERGED
        if Flag.DIVERGED in agreed:
            raise not_finite(
                problem or "a loss, a gradient or an update is not finite on at least one replica",
                step=transport.step,
                rank=transport.rank,
            )

    def settle() -> None:
        transport.settle()
        check()

    shaken = Shaken() if handshake is None else handshake.exchange(transport)
    if handshake is not None:
        check()
    means = buffer_means(buffers, shaken.differing, transport)
    with told_by_site(transport), restored_on_error(passes):
        updates = drive([p.rounds() for p in passes], transport, settle)
    return Arrived(
        updates=[
            (param, update)
            for p, of_pass in zip(passes, updates, strict=True)
            for param, update in zip(p.params, of_pass, strict=True)
        ],
        buffers={buffers[i][0]: mean for i, (_, mean) in zip(shaken.differing, means, strict=True)},
        spells=list(shaken.spells),
    )


def split(traffic: Traffic, wait_s: float) -> Traffic:
    """The traffic with so much of its seconds as waiting, and the rest as overlap."""
    return replace(traffic, wait_s=wait_s, overlap_s=traffic.wait_s - wait_s)


def awaited(transport: Transport) -> str:
    """For whom a channel's transport waits, in words."""
    wait = transport.waits.current
    return "a fragment's result" if wait is None else wait.text()
