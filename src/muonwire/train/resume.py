"""What a run goes on from: its own part of a checkpoint, or what another replica has of it."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer, sharing
from muonwire.train import agree, checkpoint
from muonwire.train.folders import Place
from muonwire.train.lengths import Length, extend, lengths_of
from muonwire.train.told import all_or_none
from muonwire.transport import Transport
from muonwire.transport.generators import random_state
from muonwire.transport.relay import Relay

if TYPE_CHECKING:
    from muonwire.train.loop import Trainer


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a replica goes on from.

    Args:
        step: steps that are done.
        lengths: of the run, with the one that it has now.
        state: of this replica; where it lacks a part of its own, what all replicas share, and fresh entries for the rest.
        lacks: whether it lacks one.
        lacking: the replicas that do, by rank, with where they looked.
        donor: the replica that gave them what all share.
        notes: what there is to say about the choice of the step, a line each.
    """

    step: int
    lengths: tuple[Length, ...]
    state: dict[str, Any]
    lacks: bool
    lacking: dict[int, Place]
    donor: int
    mates: dict[int, int]
    notes: list[str]


def find(trainer: "Trainer", *, free: Collection[str]) -> Found | None:
    """Agree with the other replicas on a checkpoint, and read it; nothing of the trainer changes. None where there is none.

    Args:
        trainer: that is to go on, fresh.
        free: settings that need not be the checkpoint's.

    Raises:
        UsageError: see Trainer.resume; on all replicas.
    """
    transport, identity = trainer.everyone, trainer.identity()
    rank, world_size = transport.rank, transport.world_size
    survey = checkpoint.survey(trainer.folder, identity=identity, rank=rank, world_size=world_size, free=free)
    choice = agree.choose(survey, trainer.folder, transport)
    if choice is None:
        return None
    path = checkpoint.step_folder(trainer.folder, choice.step)
    lacks, problem = rank in choice.lacking, ""
    manifest: dict[str, Any] = {}
    state: dict[str, Any] = {}
    lent: dict[str, Any] = {}
    try:
        if not lacks:
            manifest, state = checkpoint.read_manifest(path), checkpoint.load(path, rank=rank)
        if choice.lacking and rank == choice.donor:
            lent = {
                "manifest": json.dumps(manifest),
                "weights": checkpoint.load_weights(path),
                "optimizer": sharing.shared_part(trainer.optimizer, state["optimizer"]),
                "totals": state["totals"],
                "diagnostics": _shared_probes(state.get("diagnostics")),
            }
    except (OSError, ValueError, KeyError) as error:
        problem = str(error)
    all_or_none(problem, transport)
    if choice.lacking:
        lent = agree.lend(lent, donor=choice.donor, transport=transport)
    mates = _mates(trainer.transport, choice.lacking)
    own = _lend_inside(trainer.transport, state, mates)
    lengths = trainer.lengths
    try:
        if lacks:
            manifest = json.loads(lent["manifest"])
            state = _beginning(trainer, lent if own is None else own)
            problem = checkpoint.refusal(path, manifest, identity=identity, world_size=world_size, free=free)
        if not problem:
            lengths = extend(lengths_of(manifest["identity"]["config"]), trainer.config, done=choice.step)
    except UsageError as error:
        problem = str(error)
    all_or_none(problem, transport)
    return Found(
        step=choice.step,
        lengths=lengths,
        state=state,
        lacks=lacks and rank not in mates,
        lacking=choice.lacking,
        donor=choice.donor,
        mates=mates,
        notes=choice.notes,
    )


def _shared_probes(diagnostics: dict[str, Any] | None) -> dict[str, Any] | None:
    """What all replicas measured; the averages are of a replica's own gradients. None where nothing was kept."""
    return {**diagnostics, "averages": []} if diagnostics and diagnostics["averages"] else None


def _mates(transport: Transport, lacking: Collection[int]) -> dict[int, int]:
    """For each replica that lacks its part, one of its site that has its own, where there is one."""
    if not isinstance(transport, Relay):
        return {}
    found: dict[int, int] = {}
    for of_site in transport.ranks:
        whole = [rank for rank in of_site if rank not in lacking]
        found |= {rank: whole[0] for rank in of_site if rank in lacking and whole}
    return found


def _lend_inside(transport: Transport, state: dict[str, Any], mates: dict[int, int]) -> dict[str, Any] | None:
    """The state of the replica of this site that lends it; None in a site where nobody lacks one, or nobody has one."""
    if not isinstance(transport, Relay):
        return None
    of_site = transport.ranks[transport.site]
    lenders = {mate for rank, mate in mates.items() if rank in of_site}
    if not lenders:
        return None
    lent: dict[str, Any] = agree.lend(state, donor=of_site.index(lenders.pop()), transport=transport.inside)
    return lent


def _beginning(trainer: "Trainer", lent: dict[str, Any]) -> dict[str, Any]:
    """The state that was lent: the lender's own part is left out or that of the whole site; what is this replica's begins anew."""
    diagnostics = lent["diagnostics"]
    if diagnostics is not None:
        diagnostics = {**diagnostics, "averages": trainer.diagnostics.state_dict()["averages"]}
    return {
        **lent,
        "random": random_state(),
        "recent_losses": [],
        "diagnostics": diagnostics,
    }


def losses(found: Found, optimizer: ChainOptimizer) -> list[str]:
    """A line for each replica that lacked its part of the checkpoint: what it got, and what is lost.

    Args:
        found: what the replicas go on from.
        optimizer: whose state is loaded.
    """
    own = sharing.own_entries(optimizer) if found.lacking else []
    alone = optimizer.steps_alone if optimizer.local is not None else 0
    lines = []
    for rank, place in found.lacking.items():
        lost = [
            *([f"its own {alone} step(s) since the last synchronization"] if alone else []),
            *(["the metrics so far"] if rank == 0 else []),
            "its random state",
        ]
        if rank in found.mates:
            lines.append(
                f"replica {rank} has no whole part of step {found.step} in {place}: weights and state come from replica "
                f"{found.mates[rank]} of its site; lost are {'the metrics so far, and ' * (rank == 0)}its random state"
            )
            continue
        zero = f"{', '.join(own)} begin at zero, and " if own else ""
        lines.append(
            f"replica {rank} has no whole part of step {found.step} in {place}: weights and shared state come from replica "
            f"{found.donor}; {zero}lost are {', '.join(lost)}"
        )
    return lines
