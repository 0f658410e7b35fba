"""`muonwire secret`."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from muonwire.cli.arguments import command
from muonwire.transport.secret import write_secret

EXAMPLES = ("muonwire secret run.secret",)


@dataclass(frozen=True, kw_only=True)
class SecretCommand:
    """Arguments of `muonwire secret`.

    Args:
        file: a new file, which only you may read.
    """

    file: Positional[Path] = Path("muonwire.secret")


@command(
    SecretCommand,
    name="secret",
    about="Write a random secret for --secret-file; copy it to every machine of the run, by a way that strangers cannot read.",
    examples=EXAMPLES,
)
def main(options: SecretCommand) -> int:
    """Run the command; returns the exit code."""
    write_secret(options.file)
    print(
        f"wrote {options.file}; copy it to every machine (scp -p), and start all replicas with --secret-file"
    )
    return 0
