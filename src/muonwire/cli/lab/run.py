"""`muonwire lab run`."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from muonwire.cli.arguments import Positionals, command
from muonwire.cli.lab.report import write
from muonwire.errors import UsageError
from muonwire.lab.engine.catalog import choose, load_claims
from muonwire.lab.engine.run import LabConfig, run
from muonwire.spectra.models import PACKAGED


@dataclass(frozen=True, kw_only=True)
class LabRun:
    """Arguments of `muonwire lab run`.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        all: say that all are meant; the same as none.
        out: folder of measurements, inputs and the page.
        quick: one seed, and sizes and steps as small as a test wants them; no evidence.
        jobs: measurements side by side. Default: the number of cores.
        claims_from: Python files with claims of your own.
        language_model: the pretrained model whose gradients are measured: a folder of transformers, a GGUF file, a hub name, or
            smollm2.
    """

    ids: Positionals = ()
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
        return LabConfig(**{name: value for name, value in vars(self).items() if name != "all"})


@command(
    LabRun,
    name="lab run",
    about="Measure claims and write the page. Repeats that are measured already are kept, so the same command resumes.",
    examples=(
        "muonwire lab run --all",
        "muonwire lab run conflict.1 integration --jobs 2",
        "muonwire lab run --quick",
        "muonwire lab run future.1 --language-model HuggingFaceTB/SmolLM2-360M --out runs/lab360m",
    ),
)
def main(options: LabRun) -> int:
    """Measure claims and write their page; returns the exit code, 1 where a measurement failed."""
    config = options.config
    claims = choose(load_claims(config.claims_from), config.ids)
    failures = run(config, claims, say=lambda text: print(text, flush=True))
    write(config.out, config.ids, quick=config.quick, claims_from=config.claims_from)
    if failures:
        again = shlex.join(["muonwire", "lab", "run", *failures])
        print(f"failed: {', '.join(failures)}; the others are kept. Again with: {again}")
    return 1 if failures else 0
