"""Something that several claims are measured on: made once, kept in the lab's output."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muonwire.errors import UsageError
from muonwire.spectra.models import PACKAGED

ABOUT = "about.json"


def plain(about: object) -> dict[str, Any]:
    """``about`` as it reads back from a JSON file: tuples are lists."""
    made: dict[str, Any] = json.loads(json.dumps(about))
    return made


def write_about(folder: Path, about: Mapping[str, object]) -> None:
    """Write what an input is and what it was made with; it is there from then on."""
    (folder / ABOUT).write_text(json.dumps(about, indent=1))


@dataclass(frozen=True, kw_only=True)
class Input:
    """Something that claims read.

    Args:
        name: of its folder.
        about: what it is, for the page; with ``of_model``, {model} stands for the model's name.
        make: fills a folder, with little where quick is true; with ``of_model``, from a pretrained model of that name.
        made_with: what ``about.json`` must hold for the folder to count, quick or not. Default: nothing in particular.
        seeds: how many it was made with, where it was; claims that read it repeat as often. Default: any.
        of_model: whether it is made from a pretrained model that the user may choose.
    """

    name: str
    about: str
    make: Callable[..., None]
    made_with: Callable[[bool], dict[str, object]] = lambda quick: {}
    seeds: int | None = None
    of_model: bool = False

    def folder(self, out: Path, *, quick: bool) -> Path:
        """Where it lies in a lab's output."""
        return out / "inputs" / (f"{self.name}-quick" if quick else self.name)

    def check_model(self, out: Path, *, quick: bool, model: str) -> None:
        """Raise UsageError where it was made from another model, which other measurements in ``out`` rest on."""
        folder = self.folder(out, quick=quick)
        kept = self._kept(folder)
        if kept is not None and self.of_model and not quick and kept.get("of", PACKAGED) != model:
            raise UsageError(
                f"lab: {folder} was made from {kept.get('of', PACKAGED)}, not from {model}; give the measurements of another "
                "model a folder of their own with --out"
            )

    def prepare(self, out: Path, *, quick: bool, model: str = PACKAGED) -> Path:
        """Make it unless it is there, complete and made with what it is made with now.

        Raises:
            UsageError: see ``check_model``.
        """
        self.check_model(out, quick=quick, model=model)
        folder = self.folder(out, quick=quick)
        kept = self._kept(folder)
        if kept is None or not self.made_with(quick).items() <= kept.items():
            folder.mkdir(parents=True, exist_ok=True)
            self.make(folder, quick, *([model] if self.of_model else []))
        return folder

    def described(self, out: Path, *, quick: bool) -> str:
        """``about``, with the name of the model that it was made from."""
        kept = self._kept(self.folder(out, quick=quick)) or {}
        return self.about.format(model=kept.get("model", PACKAGED)) if self.of_model else self.about

    @staticmethod
    def _kept(folder: Path) -> dict[str, Any] | None:
        path = folder / ABOUT
        return json.loads(path.read_text()) if path.exists() else None
