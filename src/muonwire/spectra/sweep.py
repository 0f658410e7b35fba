"""Many edits of one model, each measured against the original."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.spectra.edit import chosen_weights, decompose, edited
from muonwire.spectra.edits import (
    Clip,
    Drop,
    Edit,
    Factors,
    Flatten,
    Keep,
    Permute,
    PolarFactor,
    Rotate,
    Scale,
)
from muonwire.spectra.likeness import Likeness, Reference
from muonwire.spectra.weights import weights_of
from muonwire.train.metrics import finite_or_none, read_lines

JOURNAL = "sweep.jsonl"


@dataclass(frozen=True, kw_only=True)
class Point:
    """An edit at one strength.

    Args:
        name: of the edit.
        strength: what is varied, growing with how much it changes.
        edit: with that strength.
    """

    name: str
    strength: float
    edit: Edit


def _points(name: str, edits: Sequence[tuple[float, Edit]]) -> list[Point]:
    return [Point(name=name, strength=strength, edit=edit) for strength, edit in edits]


# The strength is the share of the singular values that an edit changes, or its distance from no change; where a tenth is
# doubled, the place at which that tenth ends.
SWEEP: tuple[Point, ...] = (
    *_points("drop the smallest", [(f, Drop(fraction=f, which="smallest")) for f in (0.1, 0.25, 0.5, 0.75)]),
    *_points("drop the largest", [(f, Drop(fraction=f)) for f in (0.002, 0.01, 0.05, 0.25)]),
    *_points("keep the smallest half", [(0.5, Keep(fraction=0.5, which="smallest"))]),
    *_points("clip from above", [(1 / c, Clip(high=c)) for c in (4.0, 2.0, 1.5, 1.0)]),
    *_points("raise the smallest", [(c, Clip(low=c)) for c in (0.25, 0.5, 0.75, 1.0)]),
    *_points("flatten", [(1 - p, Flatten(power=p)) for p in (0.9, 0.75, 0.5, 0.25)]),
    *_points("sharpen", [(p - 1, Flatten(power=p)) for p in (1.1, 1.25, 1.5, 2.0)]),
    *_points(
        "double a tenth",
        [(round(s + 0.1, 1), Scale(factor=2.0, start=s, stop=s + 0.1)) for s in (0.0, 0.3, 0.6, 0.9)],
    ),
    *_points("polar factor", [(1.0, PolarFactor())]),
    *_points("permute (control)", [(1.0, Permute())]),
    *_points("rotate (control)", [(1.0, Rotate())]),
)


class Editor:
    """Edits a model for a measurement and undoes it; each matrix is decomposed once.

    Args:
        model: it is restored after each measurement.
        kinds: kinds or groups that are edited; their decompositions take about twice their weights' memory.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[str]) -> None:
        self.model = model
        self._factors: dict[str, Factors] = {}
        self._originals: dict[str, Tensor] = {}
        for weight in weights_of(model):
            if weight.kind in kinds or weight.group in kinds:
                for name, matrix in weight.matrices():
                    found = decompose(name, matrix)
                    self._factors[name] = Factors(*(t.float() for t in found))
                    self._originals[name] = matrix.clone()
        if not self._factors:
            raise UsageError(f"sweep: kinds {', '.join(kinds)} match no weight")

    @torch.no_grad()
    def tried(self, edit: Edit, measure: Callable[[nn.Module], Likeness]) -> Likeness:
        """The measurement of the edited model; the edit is undone afterwards."""
        changed = []
        try:
            for weight, its_edits in chosen_weights(self.model, [edit]):
                for name, matrix in weight.matrices():
                    if name not in self._factors:
                        raise UsageError(
                            f"sweep: {edit} would change {name}, which is not among the kinds of this sweep"
                        )
                    changed.append((name, matrix))
                    matrix.copy_(edited(name, self._factors[name], its_edits).product)
            return measure(self.model)
        finally:
            for name, matrix in changed:
                matrix.copy_(self._originals[name])


class Journal:
    """The measurements of a sweep, one a line, so that a stopped sweep continues.

    Args:
        folder: of the sweep.
        name: of the model.
        reference: the original; lines of another model, or on other text, do not count.
    """

    def __init__(self, folder: Path, name: str, reference: Reference) -> None:
        self._path = folder / JOURNAL
        windows = hashlib.blake2b(reference.windows.numpy().tobytes(), digest_size=8).hexdigest()
        self._made_with = {"model": name, "windows": windows, "original": reference.itself.loss}
        self.found: dict[str, Likeness] = {
            line["edit"]: _likeness(line["found"])
            for line in read_lines(self._path)
            if line.get("made_with") == self._made_with
        }

    def write(self, edit: Edit, found: Likeness) -> None:
        """Add the measurement of one edit."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = {k: finite_or_none(v) for k, v in asdict(found).items()}
        line: dict[str, Any] = {"made_with": self._made_with, "edit": str(edit), "found": kept}
        with self._path.open("a+b") as file:
            # A run that was killed may have left half a line; this one starts on a new line.
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _likeness(kept: dict[str, Any]) -> Likeness:
    values: dict[str, Any] = {k: float("inf") if v is None else v for k, v in kept.items()}
    return Likeness(**values)


def sweep(
    model: nn.Module,
    reference: Reference,
    *,
    kinds: Sequence[str],
    points: Sequence[Point] = SWEEP,
    known: Mapping[str, Likeness] | None = None,
) -> Iterator[tuple[str, Point, Likeness]]:
    """Every point on every kind of weights.

    Args:
        model: the original.
        reference: its predictions.
        kinds: kinds or groups, such as "attention" and "mlp".
        points: edits and their strengths.
        known: earlier measurements, by the edit's text; they are not repeated.

    Yields:
        the kind, the point with its edit on that kind, and the measurement.
    """
    known = known or {}
    cases = [(kind, replace(p, edit=replace(p.edit, kind=kind))) for kind in kinds for p in points]
    missing = {kind for kind, point in cases if str(point.edit) not in known}
    editor = Editor(model, [k for k in kinds if k in missing]) if missing else None
    for kind, point in cases:
        found = known.get(str(point.edit))
        if found is None:
            assert editor is not None
            found = editor.tried(point.edit, reference.compare)
        yield kind, point, found
