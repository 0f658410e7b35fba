"""`muonwire lab report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from muonwire.cli.arguments import Positionals, command
from muonwire.lab.engine.catalog import choose, load_claims
from muonwire.lab.engine.page import PAGE_NAME, read_verdicts, write_report


@dataclass(frozen=True, kw_only=True)
class LabReport:
    """Arguments of `muonwire lab report`.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        out: folder of the measurements; the page goes there too.
        quick: show the quick measurements.
        claims_from: Python files with claims of your own.
    """

    ids: Positionals = ()
    out: Path = Path("runs/lab")
    quick: bool = False
    claims_from: tuple[Path, ...] = ()


@command(
    LabReport,
    name="lab report",
    about="Write the page from what is measured: lab.html, verdicts.json, rows as Parquet, charts as PNG.",
    examples=("muonwire lab report", "muonwire lab report conflict --out runs/lab"),
)
def main(options: LabReport) -> int:
    """Write the page of the claims; returns the exit code."""
    write(options.out, options.ids, quick=options.quick, claims_from=options.claims_from)
    return 0


def write(out: Path, ids: Sequence[str], *, quick: bool, claims_from: Sequence[Path]) -> None:
    """Write the page of these claims into ``out``, and print their verdicts."""
    write_report(choose(load_claims(claims_from), ids), out=out, quick=quick)
    for claim, verdict in read_verdicts(out / "verdicts.json").items():
        print(f"{claim}: {verdict}")
    print(f"page: {out / PAGE_NAME}")
