"""`muonwire COMMAND ...`: finds the command, runs it, and turns its errors into one line and an exit code.

Exit codes: 0 done, 1 a replica or an exchange failed, 2 bad input, 130 interrupted, 141 the reader of its output stopped reading,
143 stopped on request with a checkpoint.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from muonwire import __version__
from muonwire.cli.groups import listing
from muonwire.errors import ExchangeError, PayloadError, StoppedError, UsageError

COMMANDS = {
    "train": ("muonwire.cli.train", "train one recipe on one replica or many"),
    "compare": (
        "muonwire.cli.compare",
        "train several recipes on the same work and report loss against steps, bytes, time",
    ),
    "plan": ("muonwire.cli.plan", "choose a recipe for a link and a model, before the run"),
    "status": ("muonwire.cli.status", "show who is in a run, since when, and who waits for whom"),
    "lab": ("muonwire.cli.lab", "measure the claims of the five notes and write the page of their verdicts"),
    "spectra": (
        "muonwire.cli.spectra",
        "look at, change and talk to the singular values of trained models",
    ),
    "bench": ("muonwire.cli.bench", "measure a room of the library against its peers"),
    "secret": ("muonwire.cli.secret", "make the secret that keeps strangers out of a run"),
    "env": ("muonwire.cli.env", "show versions, processor and network, for a bug report"),
    "recipes": ("muonwire.cli.recipes", "list the recipes, their chains and options"),
}
# The extras with all that a command imports: what a message about a missing package tells to install.
EXTRAS = {
    "train": "train",
    "compare": "train,report",
    "plan": "train,report",
    "status": "train,report",
    "lab": "lab",
    "spectra": "lab",
    "bench": "train,report",
    "secret": "train",
    "env": "train",
    "recipes": "train",
}


def usage() -> str:
    """The text of `muonwire --help`."""
    head = f"muonwire {__version__}: Muon over slow links, every byte counted"
    end = "muonwire COMMAND --help shows a command's options, with examples."
    return "\n".join([head, "", "usage: muonwire COMMAND [options]", "", *listing(COMMANDS), "", end])


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(0 if args else 2)
    if args[0] == "--version":
        print(__version__)
        sys.exit(0)
    if args[0] not in COMMANDS:
        sys.exit(_fail(f"muonwire: {args[0]!r} is not a command; allowed are {', '.join(COMMANDS)}", 2))
    try:
        command = importlib.import_module(COMMANDS[args[0]][0])
        code = command.main(args[1:])
        sys.stdout.flush()
        sys.exit(code)
    except UsageError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except (ExchangeError, PayloadError) as error:
        sys.exit(_fail(f"error: {error}", 1))
    except StoppedError as error:
        sys.exit(_fail(str(error), 143))
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("muonwire"):
            raise
        remedy = f'pip install "muonwire[{EXTRAS[args[0]]}]"'
        sys.exit(_fail(f"error: {args[0]} needs {error.name}, which is not installed; {remedy}", 1))
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except BrokenPipeError:
        # The reader of the output, such as `head`, stopped reading. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
