"""Checkpoints: safetensors for tensors, JSON for the rest; complete or not there at all.

    checkpoints/step_00000100/manifest.json        what the run is; the same in every folder
                              model.safetensors    the weights that all replicas share
                              rank_0.safetensors   each replica's own weights, optimizer, feedback and random states
                              rank_0.json          ... and its numbers

Every replica writes into its own host's folder, which may be one for several of them or for all. A checkpoint is written under a
partial name, gets its own when all replicas have said that theirs is written, and lets an older one go when all have said that it
has its name. So whenever replicas are killed, there is a step that all of them have. The folders of several hosts, copied
into one, are the folder of a run on one machine.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.train.folders import Together
from muonwire.transport.base import Transport

FORMAT = 4
MODEL = "model.safetensors"
MANIFEST = "manifest.json"
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a folder holds for one replica, of a run that is to go on.

    Args:
        held: the steps whose part of this replica is whole, each with the name of the attempt that wrote it.
        lends: those of them whose shared weights are whole too.
        damaged: what is wrong with the others, by step.
        strays: the replicas whose parts are there where this replica's is not, by step.
        refused: why the newest checkpoint is not one of this run; empty where it is.
    """

    held: dict[int, str] = field(default_factory=dict)
    lends: list[int] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    strays: dict[int, list[int]] = field(default_factory=dict)
    refused: str = ""


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


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in the folder of a run."""
    return folder / "checkpoints" / f"step_{step:08d}"


def latest(folder: Path) -> Path | None:
    """The newest checkpoint below ``folder`` that has its name, or None."""
    found = named(folder)
    return found[-1] if found else None


def named(folder: Path) -> list[Path]:
    """The checkpoints below ``folder`` that have their names, the newest last."""
    found = (path.parent for path in folder.glob(f"checkpoints/step_*/{MANIFEST}"))
    return sorted(path for path in found if not path.suffix)


def save(
    folder: Path,
    *,
    step: int,
    identity: Mapping[str, Any],
    shared: Mapping[str, Tensor],
    state: Any,
    transport: Transport,
    together: Together | None = None,
) -> Path:
    """Write a checkpoint; all replicas call it in the same step. Older ones beyond the last two are removed.

    Args:
        folder: of the run, on this host.
        step: steps done.
        identity: what a run must have in common with this one to continue from here.
        shared: the shared weights by name.
        state: this replica's own state: a tree of dicts, lists, tensors and numbers.
        transport: between the replicas.
        together: which replicas share the folder. Default: that is found out.

    Raises:
        UsageError: a replica cannot write its part; on all of them, and older checkpoints are as they were.
    """
    together = together or Together.find(folder, transport)
    final = step_folder(folder, step)
    partial = final.with_name(final.name + ".partial")
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": transport.world_size,
        "attempt": together.launch,
        "identity": dict(identity),
    }
    problem = ""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        _write_part(partial, rank=transport.rank, attempt=together.launch, state=state)
        if together.first:
            weights = {k: v.detach().cpu().contiguous().clone() for k, v in shared.items()}
            save_file(weights, partial / MODEL)
            write_json(partial / MANIFEST, {**manifest, "model_digest": _digest(partial / MODEL)})
    except (OSError, SafetensorError) as error:
        problem = f"{partial} cannot be written ({error})"
    _all_did("write", step, problem, transport)
    # All replicas have written theirs: those that are killed from here on still have the step before.
    if together.first:
        try:
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
        except OSError as error:
            problem = f"{partial} cannot be renamed to {final.name} ({error})"
    _all_did("name", step, problem, transport)
    if together.first:
        _remove_others(folder, step)
    return final


def _write_part(partial: Path, *, rank: int, attempt: str, state: Any) -> None:
    tensors: dict[str, Tensor] = {}
    tree = flatten(state, tensors)
    path = partial / f"rank_{rank}.safetensors"
    save_file(tensors, path)
    write_json(path.with_suffix(".json"), {"attempt": attempt, "digest": _digest(path), "state": tree})


def _all_did(what: str, step: int, problem: str, transport: Transport) -> None:
    """Raise UsageError on all replicas where one of them had a problem."""
    said = [message.decode() for message in transport.gather(problem.encode(), purpose="control")]
    problems = [f"replica {rank}: {text}" for rank, text in enumerate(said) if text]
    if problems:
        raise UsageError(
            f"checkpoint: not all replicas could {what} that of step {step}: {'; '.join(problems)}. The one before is as it was: "
            "make room there, and resume"
        )


def _remove_others(folder: Path, step: int) -> None:
    """Keep the newest two up to ``step``; what is newer was left by an attempt from which the run did not go on."""
    for path in folder.glob("checkpoints/step_*.partial"):
        # A replica that is ahead may be writing a later one.
        if path.with_suffix("") <= step_folder(folder, step):
            shutil.rmtree(path, ignore_errors=True)
    kept = [path for path in named(folder) if path <= step_folder(folder, step)][-KEPT:]
    for path in named(folder):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _differences(saved: Any, wanted: Any, path: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = [*saved, *(k for k in wanted if k not in saved)]
        return [d for k in keys for d in _differences(saved.get(k), wanted.get(k), f"{path}.{k}".lstrip("."))]
    return [] if saved == wanted else [f"{path} was {saved!r}, now {wanted!r}"]


def _without(identity: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    config = {key: value for key, value in identity["config"].items() if key not in free} if free else None
    return identity if config is None else {**identity, "config": config}


def survey(
    folder: Path, *, identity: Mapping[str, Any], rank: int, world_size: int, free: Collection[str] = ()
) -> Survey:
    """What the folder holds for a replica of the run with this identity; damaged files are told, and nothing is raised.

    Args:
        folder: of the run, on this host.
        identity: of the run that is to continue.
        rank: of the replica.
        world_size: number of replicas that the run has now.
        free: settings under the identity's "config" that need not be the checkpoint's. Default: none.
    """
    found = Survey()
    refused = ""
    for path in named(folder):
        step = int(path.name.removeprefix("step_"))
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            refused = refusal(path, manifest, identity=identity, world_size=world_size, free=free)
            if refused:
                continue
            attempt, model_digest = str(manifest["attempt"]), manifest["model_digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found.damaged[step] = f"{path / MANIFEST} cannot be read ({error})"
            continue
        problem = _problem(path, rank=rank, attempt=attempt)
        if problem:
            found.damaged[step] = problem
        elif problem is None:
            found.held[step] = attempt
            with contextlib.suppress(OSError):
                if _digest(path / MODEL) == model_digest:
                    found.lends.append(step)
        else:
            found.strays[step] = sorted(int(p.stem.removeprefix("rank_")) for p in path.glob("rank_*.json"))
    # The newest says whose folder it is.
    return replace(found, refused=refused)


def refusal(
    path: Path,
    manifest: Mapping[str, Any],
    *,
    identity: Mapping[str, Any],
    world_size: int,
    free: Collection[str] = (),
) -> str:
    """Why the checkpoint with this manifest is not one of the run with this identity; empty where it is."""
    if manifest["format"] != FORMAT:
        return (
            f"checkpoint: {path} has format {manifest['format']}, this version reads {FORMAT}; go on with the version that wrote "
            f"it, or start afresh from its weights ({MODEL})"
        )
    if manifest["world_size"] != world_size:
        return (
            f"checkpoint: {path} was written by {manifest['world_size']} replicas, this run has {world_size}; each replica's "
            f"feedback is its own, so resume with --replicas {manifest['world_size']}"
        )
    wanted = json.loads(json.dumps(identity))
    differences = _differences(_without(manifest["identity"], free), _without(wanted, free))
    if differences:
        return (
            f"checkpoint: {path} belongs to another run: {'; '.join(differences[:4])}. Resume with the settings it was "
            "started with, or choose another --out"
        )
    return ""


def _problem(path: Path, *, rank: int, attempt: str) -> str | None:
    """What is wrong with a replica's part of a checkpoint: None where it is whole, an empty text where there is none."""
    numbers, tensors = path / f"rank_{rank}.json", path / f"rank_{rank}.safetensors"
    if not numbers.exists() and not tensors.exists():
        return ""
    try:
        part = json.loads(numbers.read_text())
        if part["attempt"] != attempt:
            return f"{path} has a part of rank {rank} from another attempt at this step"
        if part["digest"] != _digest(tensors):
            raise ValueError(f"{tensors.name} is not what was written")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} is damaged for rank {rank} ({error})"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at ``path``."""
    manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    return manifest


def load(path: Path, *, rank: int) -> Any:
    """The state of a replica in the checkpoint at ``path``, which ``survey`` found to be whole.

    Raises:
        UsageError: it is not.
    """
    try:
        tree = json.loads((path / f"rank_{rank}.json").read_text())["state"]
        return unflatten(tree, load_file(path / f"rank_{rank}.safetensors"))
    except Exception as error:  # safetensors raises its own exception class for damaged files
        raise UsageError(
            f"checkpoint: {path} is damaged for rank {rank} ({error}); remove it and resume again"
        ) from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """The shared weights in the checkpoint at ``path``, which ``survey`` found to be whole."""
    return load_file(path / MODEL)
