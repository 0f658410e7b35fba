"""Checkpoints: safetensors for tensors, JSON for the rest; complete or not there at all.

    checkpoints/step_00000100/manifest.json        what the run is; written last, its presence makes the checkpoint valid
                              model.safetensors    the weights that all replicas share
                              rank_0.safetensors   each replica's own weights, optimizer, feedback and random states
                              rank_0.json          ... and its numbers

All replicas write into the same folder.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.transport.base import Transport

FORMAT = 3
MANIFEST = "manifest.json"
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a checkpoint holds for one replica.

    Args:
        step: steps done.
        identity: of the run that wrote it.
        state: of this replica.
    """

    step: int
    identity: dict[str, Any]
    state: Any


def flatten(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """A JSON tree of ``tree``, whose tensors are put into ``tensors`` under their path; ``unflatten`` undoes it."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(tree, dict):
        return {"$dict": [[k, flatten(v, tensors, f"{path}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, list | tuple):
        return [flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(
        f"checkpoint: {path} is a {type(tree).__name__}; states hold tensors, numbers, texts, lists and dicts"
    )


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of flatten; tuples come back as lists."""
    if isinstance(tree, dict):
        if "$tensor" in tree:
            return tensors[tree["$tensor"]]
        return {k: unflatten(v, tensors) for k, v in tree["$dict"]}
    if isinstance(tree, list):
        return [unflatten(v, tensors) for v in tree]
    return tree


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below ``folder``, or None."""
    complete = sorted(p.parent for p in folder.glob(f"checkpoints/step_*/{MANIFEST}"))
    return complete[-1] if complete else None


def save(
    folder: Path,
    *,
    step: int,
    identity: Mapping[str, Any],
    shared: Mapping[str, Tensor],
    state: Any,
    transport: Transport,
) -> Path:
    """Write a checkpoint; all replicas call it in the same step. Older ones beyond the last two are removed.

    Args:
        folder: of the run.
        step: steps done.
        identity: what a run must have in common with this one to continue from here.
        shared: the shared weights by name.
        state: this replica's own state: a tree of dicts, lists, tensors and numbers.
        transport: between the replicas.
    """
    final = folder / "checkpoints" / f"step_{step:08d}"
    partial = final.with_name(final.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    tree = flatten(state, tensors)
    save_file(tensors, partial / f"rank_{transport.rank}.safetensors")
    write_json(partial / f"rank_{transport.rank}.json", tree)
    if transport.rank == 0:
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in shared.items()},
            partial / "model.safetensors",
        )
    transport.gather(b"written", purpose="control")
    if transport.rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": transport.world_size,
            "identity": dict(identity),
        }
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for old in sorted(folder.glob("checkpoints/step_*"))[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _differences(saved: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [*saved, *(k for k in wanted if k not in saved)]
        return [d for k in keys for d in _differences(saved.get(k), wanted.get(k), f"{path}.{k}".lstrip("."))]
    return [] if saved == wanted else [f"{path} was {saved!r}, now {wanted!r}"]


def _without(identity: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    config = {key: value for key, value in identity["config"].items() if key not in free} if free else None
    return identity if config is None else {**identity, "config": config}


def load(
    path: Path, *, identity: Mapping[str, Any], transport: Transport, free: Collection[str] = ()
) -> Saved:
    """What the checkpoint holds for this replica.

    Args:
        path: of the checkpoint.
        identity: of the run that is to continue from it.
        transport: between the replicas.
        free: settings under the identity's "config" that need not be the checkpoint's. Default: none.

    Raises:
        UsageError: the checkpoint is damaged, or belongs to another run, model or number of replicas.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        known, world_size = manifest["format"], manifest["world_size"]
        saved_identity, step = manifest["identity"], int(manifest["step"])
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"checkpoint: {path / MANIFEST} cannot be read ({error}); give another, or start afresh"
        ) from error
    if known != FORMAT:
        raise UsageError(
            f"checkpoint: {path} has format {known}, this version reads {FORMAT}; go on with the version that wrote it, or start "
            "afresh from its weights (model.safetensors)"
        )
    if world_size != transport.world_size:
        raise UsageError(
            f"checkpoint: {path} was written by {world_size} replicas, this run has {transport.world_size}; each replica's "
            f"feedback is its own, so resume with --replicas {world_size}"
        )
    wanted = json.loads(json.dumps(identity))
    differences = _differences(_without(saved_identity, free), _without(wanted, free))
    if differences:
        raise UsageError(
            f"checkpoint: {path} belongs to another run: {'; '.join(differences[:4])}. Resume with the settings it was "
            "started with, or choose another --out"
        )
    try:
        tree = json.loads((path / f"rank_{transport.rank}.json").read_text())
        tensors = load_file(path / f"rank_{transport.rank}.safetensors")
        return Saved(step=step, identity=saved_identity, state=unflatten(tree, tensors))
    except Exception as error:  # safetensors raises its own exception class for damaged files
        raise UsageError(
            f"checkpoint: {path} is damaged for rank {transport.rank} ({error}); remove it and resume again"
        ) from error


def random_state() -> dict[str, Any]:
    """The states of torch's generators."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo random_state."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
