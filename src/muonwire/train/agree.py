"""Which checkpoint the replicas go on from, and what one of them gets from another where it has none.

Before anything is changed, every replica tells the others which steps are whole in its folder. They go on from the newest step that
all of them have. Where there is none, those that have lost theirs get from another replica what all replicas share, and begin
anew with what was their own.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.train.checkpoint import Survey, flatten, unflatten
from muonwire.train.folders import Place
from muonwire.train.told import raise_told, tell
from muonwire.transport.base import Transport


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The checkpoint that the replicas go on from.

    Args:
        step: its step.
        lacking: the replicas that do not have it, with where they looked, by rank.
        donor: the replica that gives these what all replicas share.
        notes: what there is to say about it, a line each.
    """

    step: int
    lacking: dict[int, Place]
    donor: int
    notes: list[str]


def choose(found: Survey, folder: Path, transport: Transport) -> Choice | None:
    """Agree on a checkpoint; all replicas call it together. None where no replica has one.

    Args:
        found: what this replica's folder holds.
        folder: of the run, on this host.
        transport: between the replicas.

    Raises:
        UsageError: a folder holds another run, or damaged checkpoints only; on all replicas.
    """
    own = {**asdict(found), "place": asdict(Place.here(folder))}
    told = tell(own, transport)
    raise_told({rank: message["refused"] for rank, message in enumerate(told)})
    held = [{(int(step), attempt) for step, attempt in message["held"].items()} for message in told]
    lends = [set(message["lends"]) for message in told]
    damaged = {
        (rank, int(step)): text
        for rank, message in enumerate(told)
        for step, text in message["damaged"].items()
    }
    _refuse_strays(told, held)
    common = set.intersection(*held)
    if common:
        chosen = max(common)
    else:
        counts = Counter(
            one
            for rank, ones in enumerate(held)
            for one in ones
            if any(one[0] in lends[r] for r in _with(one, held))
        )
        if not counts:
            lost = [f"replica {rank}: {text}" for (rank, _), text in damaged.items()]
            if lost or any(held):
                text = lost[0] if lost else "no replica's folder has the shared weights"
                raise UsageError(
                    f"checkpoint: {text}, and no replica has a step from which all can go on; remove what is damaged and resume "
                    "again, or choose another --out"
                )
            return None
        chosen = max(counts, key=lambda one: (counts[one], one))
    step = chosen[0]
    places = [Place(**message["place"]) for message in told]
    lacking = {rank: place for rank, place in enumerate(places) if chosen not in held[rank]}
    holders = _with(chosen, held)
    donor = next((rank for rank in holders if step in lends[rank]), holders[0])
    notes = [
        f"replica {rank}: {text}, and is passed over" for (rank, at), text in damaged.items() if at >= step
    ]
    ahead = {rank: max(ones)[0] for rank, ones in enumerate(held) if ones and max(ones)[0] > step}
    if ahead:
        listed = ", ".join(f"replica {rank} has step {at}" for rank, at in ahead.items())
        notes.append(f"the replicas go on from step {step}, the newest that they have in common; {listed}")
    return Choice(step=step, lacking=lacking, donor=donor, notes=notes)


def _refuse_strays(told: list[dict[str, Any]], held: list[set[tuple[int, str]]]) -> None:
    """Raise UsageError where the part that a replica lacks lies in another's folder, as when machines have changed their ranks."""
    for rank, message in enumerate(told):
        for step, others in message["strays"].items():
            missed = (
                [o for o in others if int(step) not in {at for at, _ in held[o]}] if not held[rank] else []
            )
            if missed:
                place = Place(**message["place"])
                raise UsageError(
                    f"checkpoint: {place} is the folder of replica {rank} and holds the part of replica {missed[0]}, which has "
                    "none in its own; start every machine with the --node-rank that it had, or copy the folders of all into one"
                )


def _with(one: tuple[int, str], held: list[set[tuple[int, str]]]) -> list[int]:
    return [rank for rank, ones in enumerate(held) if one in ones]


def lend(tree: Any, *, donor: int, transport: Transport) -> Any:
    """The donor's tree of dicts, lists, tensors and numbers, on every replica; all call it together.

    Args:
        tree: of the donor; the others' is not looked at.
        donor: rank of the replica that has it.
        transport: between the replicas; every one of them receives it, since a gather goes to all.
    """
    tensors: dict[str, Tensor] = {}
    opening = b""
    if transport.rank == donor:
        flat = flatten(tree, tensors)
        listed = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
        opening = json.dumps({"tree": flat, "tensors": listed}).encode()
    told = json.loads(transport.gather(opening, purpose="control")[donor])
    received: dict[str, Tensor] = {}
    for name, dtype, shape in told["tensors"]:
        payload = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes() if name in tensors else b""
        sent = transport.gather(payload, purpose="control")[donor]
        if transport.rank != donor:
            empty = torch.empty(0, dtype=getattr(torch, dtype))
            flat_tensor = torch.frombuffer(bytearray(sent), dtype=empty.dtype) if sent else empty
            received[name] = flat_tensor.reshape(shape)
    return tree if transport.rank == donor else unflatten(told["tree"], received)
