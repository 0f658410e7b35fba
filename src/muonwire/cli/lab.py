"""`muonwire lab`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from muonwire.cli.actions import Action, dispatch
from muonwire.cli.arguments import parse
from muonwire.errors import UsageError
from muonwire.lab.engine.catalog import choose, load_claims
from muonwire.lab.engine.page import PAGE_NAME, read_verdicts, write_report
from muonwire.lab.engine.run import LabConfig, run
from muonwire.spectra.models import PACKAGED

Ids = Annotated[tuple[str, ...], tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class LabRun:
    """Arguments of `muonwire lab run`.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        all: say that all are meant; the same as none.
        out: folder of measurements, inputs and the page.
        quick: sizes and steps as small as a test wants them; no evidence.
        jobs: measurements side by side. Default: the number of cores.
        claims_from: Python files with claims of your own.
        language_model: the pretrained model whose gradients are measured: a folder of transformers, a GGUF file, a hub name, or
            smollm2.
    """

    ids: Ids = ()
    all: bool = False
    out: Path = Path("runs/lab")
    quick: bool = False
    jobs: int | None = None
    claims_from: tuple[Path, ...] = ()
    language_model: str = PACKAGED

    @property
    def config(self) -> LabConfig:
        """The lab's settings."""
        if self.all and self.ids:
            raise UsageError(f"lab: --all and {', '.join(self.ids)} are both given; leave out one of them")
        return LabConfig(
            ids=self.ids,
            out=self.out,
            quick=self.quick,
            jobs=self.jobs,
            claims_from=self.claims_from,
            language_model=self.language_model,
        )


@dataclass(frozen=True, kw_only=True)
class LabReport:
    """Arguments of `muonwire lab report`.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        out: folder of the measurements; the page goes there too.
        quick: show the quick measurements.
        claims_from: Python files with claims of your own.
    """

    ids: Ids = ()
    out: Path = Path("runs/lab")
    quick: bool = False
    claims_from: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LabList:
    """Arguments of `muonwire lab list`.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        claims_from: Python files with claims of your own.
    """

    ids: Ids = ()
    claims_from: tuple[Path, ...] = ()


def _run(args: Sequence[str]) -> int:
    settings = parse(
        LabRun,
        args,
        command="lab run",
        about="Measure claims and write the page. Repeats that are measured already are kept, so the same command resumes.",
        examples=(
            "muonwire lab run --all",
            "muonwire lab run conflict.1 integration --jobs 2",
            "muonwire lab run --quick",
            "muonwire lab run future.1 --language-model HuggingFaceTB/SmolLM2-360M --out runs/lab360m",
        ),
    )
    config = settings.config
    claims = choose(load_claims(config.claims_from), config.ids)
    failures = run(config, claims, say=lambda text: print(text, flush=True))
    _write(config.out, config.ids, quick=config.quick, claims_from=config.claims_from)
    if failures:
        again = shlex.join(["muonwire", "lab", "run", *failures])
        print(f"failed: {', '.join(failures)}; the others are kept. Again with: {again}")
    return 1 if failures else 0


def _report(args: Sequence[str]) -> int:
    settings = parse(
        LabReport,
        args,
        command="lab report",
        about="Write the page from what is measured: lab.html, verdicts.json, rows as Parquet, charts as PNG.",
        examples=("muonwire lab report", "muonwire lab report conflict --out runs/lab"),
    )
    _write(settings.out, settings.ids, quick=settings.quick, claims_from=settings.claims_from)
    return 0


def _list(args: Sequence[str]) -> int:
    settings = parse(
        LabList,
        args,
        command="lab list",
        about="List the claims: id, the note that makes it, what the note says.",
        examples=("muonwire lab list", "muonwire lab list vit"),
    )
    for claim in choose(load_claims(settings.claims_from), settings.ids):
        print(f"{claim.id}  “{claim.note.title}”, {claim.repeats} seeds: {claim.says}")
    return 0


def _write(out: Path, ids: Sequence[str], *, quick: bool, claims_from: tuple[Path, ...]) -> None:
    write_report(choose(load_claims(claims_from), ids), out=out, quick=quick)
    for claim, verdict in read_verdicts(out / "verdicts.json").items():
        print(f"{claim}: {verdict}")
    print(f"page: {out / PAGE_NAME}")


ACTIONS: dict[str, Action] = {"list": _list, "run": _run, "report": _report}


USAGE = "\n".join(
    [
        "usage: muonwire lab ACTION [IDS] [options]",
        "",
        "  list    the claims: id, the note that makes it, what the note says",
        "  run     measure claims and write the page of their verdicts",
        "  report  write the page again from what is measured",
        "",
        "examples:",
        "  muonwire lab list",
        "  muonwire lab run --all",
        "  muonwire lab run conflict.1 vit --out runs/lab",
        "  muonwire lab run --help",
    ]
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return dispatch(args, ACTIONS, command="lab", usage=USAGE)
