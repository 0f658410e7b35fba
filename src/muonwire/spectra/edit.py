"""Editing the singular values of a model in place, and writing it as an ordinary ``transformers`` folder."""

import errno
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.spectra.edits import Edit, Factors
from muonwire.spectra.models import HubTokens, Opened
from muonwire.spectra.weights import Weight, check_finite, doubled, weights_of
from muonwire.train.checkpoint import write_json

RECORD = "spectra_edit.json"
SHARD = "256MB"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Edited:
    """One matrix that was changed.

    Args:
        name: of the matrix.
        before: its singular values, (r,), falling.
        wanted: those that the edits ask for, (r,), falling.
        moved: ‖W' − W‖_F / ‖W‖_F.
    """

    name: str
    before: Tensor
    wanted: Tensor
    moved: float


def decompose(name: str, matrix: Tensor) -> Factors:
    """The singular value decomposition in float64, r = min(m, n).

    Raises:
        UsageError: the matrix holds NaN or infinity.
    """
    check_finite(name, matrix)
    return Factors(*torch.linalg.svd(doubled(matrix), full_matrices=False))


def chosen_weights(model: nn.Module, edits: Sequence[Edit]) -> list[tuple[Weight, list[Edit]]]:
    """The weights that any of the edits chooses, each with its edits in order.

    Raises:
        UsageError: an edit matches no weight.
    """
    weights = weights_of(model)
    taken = [{w.name for w in edit.choice.of(weights)} for edit in edits]
    return [
        (w, [e for e, names in zip(edits, taken, strict=True) if w.name in names])
        for w in weights
        if any(w.name in names for names in taken)
    ]


@torch.no_grad()
def edit_model(model: nn.Module, edits: Sequence[Edit], *, step: Progress | None = None) -> list[Edited]:
    """Change the singular values of a model in place, matrix by matrix.

    The edited matrix is rounded to the weight's dtype, so the spectrum that is read back differs from the wanted one by at most
    the norm of that rounding (Weyl): |σ − σ'| ≤ eps/2 · ‖W'‖_F.

    Args:
        model: any module; weights that are tied stay tied.
        edits: applied one after the other to each weight that they choose.
        step: called with the name of each matrix before it is edited.

    Raises:
        UsageError: an edit matches no weight or does not fit one, or a weight is not finite; the model may be changed in part.
    """
    done = []
    for name, matrix, its_edits in _each(model, edits):
        if step is not None:
            step(name)
        before = decompose(name, matrix)
        factors = edited(name, before, its_edits)
        new = factors.product
        moved = float((new - doubled(matrix)).norm() / before.s.norm().clamp(min=1e-300))
        matrix.copy_(new)
        wanted = factors.s.sort(descending=True).values
        done.append(Edited(name=name, before=before.s.cpu(), wanted=wanted.cpu(), moved=moved))
    return done


def edited(name: str, factors: Factors, edits: Sequence[Edit]) -> Factors:
    """The factors of a matrix after its edits; random numbers depend on its name and the edit's seed."""
    for edit in edits:
        factors = edit.apply(factors, name=name, seed=zlib.crc32(name.encode()))
    return factors


def num_edited(model: nn.Module, edits: Sequence[Edit]) -> int:
    """How many matrices ``edit_model`` changes."""
    return sum(1 for _ in _each(model, edits))


def _each(model: nn.Module, edits: Sequence[Edit]) -> Iterator[tuple[str, Tensor, list[Edit]]]:
    for weight, its_edits in chosen_weights(model, edits):
        for name, matrix in weight.matrices():
            yield name, matrix, its_edits


def write_model(
    opened: Opened,
    out: Path,
    *,
    edits: Sequence[Edit] = (),
    edited: Sequence[Edited] = (),
    overwrite: bool = False,
) -> Path:
    """Write a model as a ``transformers`` folder: safetensors in parts, its settings and its tokenizer.

    The folder appears under its name when it is complete; before, it is a hidden folder beside it, which is removed when
    something goes wrong.

    Args:
        opened: the model.
        out: the folder.
        edits, edited: the edits and their results, for ``spectra_edit.json``.
        overwrite: replace a folder that is there.

    Raises:
        UsageError: the folder is there, the disk is full, or the model is none of ``transformers``.
    """
    check_target(opened, out, overwrite=overwrite)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        # In parts, so that writing takes little memory beside the model itself.
        opened.model.save_pretrained(partial, max_shard_size=SHARD)  # type: ignore[operator]
        if isinstance(opened.tokens, HubTokens):
            opened.tokens.tokenizer.save_pretrained(partial)
        record: dict[str, Any] = {
            "model": opened.name,
            "edits": [str(e) for e in edits],
            "matrices": {e.name: {"moved": e.moved, "wanted": e.wanted.tolist()} for e in edited},
        }
        write_json(partial / RECORD, record)
        partial.chmod(0o755)
        if out.exists():
            # The old model is deleted only after the new one has its name.
            replaced = partial.with_name(partial.name + ".old")
            out.rename(replaced)
            partial.rename(out)
            shutil.rmtree(replaced)
        else:
            partial.rename(out)
    except Exception as error:
        # safetensors raises a class of its own with the system's message in it.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):
            raise UsageError(
                f"edit: no space is left to write {out}; free some, or name a folder on another disk"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def check_target(opened: Opened, out: Path, *, overwrite: bool) -> None:
    """Raise UsageError where ``write_model`` could not write, before anything is computed."""
    if not hasattr(opened.model, "save_pretrained"):
        raise UsageError(f"edit: {opened.name} is no model of transformers; only those can be written")
    if out.exists() and not overwrite:
        raise UsageError(f"edit: {out} is there already; name another folder, or give --overwrite")
    if out.exists() and not (out / "config.json").is_file() and any(out.iterdir()):
        raise UsageError(
            f"edit: {out} holds something other than a model and is not overwritten; name another folder"
        )
    if opened.source is not None and out.exists() and out.samefile(opened.source):
        raise UsageError(f"edit: {out} is the model that is edited; name another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = {p.data_ptr(): p.numel() * p.element_size() for p in opened.model.parameters()}
    needed, free = sum(unique.values()), shutil.disk_usage(out.parent).free
    if needed > free:
        raise UsageError(
            f"edit: {out} needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some, or name a folder on another disk"
        )


def read_record(folder: Path) -> dict[str, Any]:
    """The content of ``spectra_edit.json`` in a written model.

    Raises:
        UsageError: there is none.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UsageError(f"edit: {folder} was not written by `muonwire spectra edit`; it has no {RECORD}")
    record: dict[str, Any] = json.loads(path.read_text())
    return record
