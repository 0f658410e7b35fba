"""`muonwire lab list`."""

from dataclasses import dataclass
from pathlib import Path

from muonwire.cli.arguments import Positionals, command
from muonwire.lab.engine.catalog import choose, load_claims


@dataclass(frozen=True, kw_only=True)
class LabList:
    """Arguments of `muonwire lab list`.

    Args:
        ids: claims such as conflict.1, or families such as conflict. Default: all.
        claims_from: Python files with claims of your own.
    """

    ids: Positionals = ()
    claims_from: tuple[Path, ...] = ()


@command(
    LabList,
    name="lab list",
    about="List the claims: id, the note that makes it, what the note says.",
    examples=("muonwire lab list", "muonwire lab list vit"),
)
def main(options: LabList) -> int:
    """List claims; returns the exit code."""
    for claim in choose(load_claims(options.claims_from), options.ids):
        print(f"{claim.id}  “{claim.note.title}”, {claim.repeats} seeds: {claim.says}")
    return 0
