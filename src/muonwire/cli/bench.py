"""`muonwire bench ROOM`: measures a room of the library against its peers."""

import importlib
from collections.abc import Sequence

from muonwire.errors import UsageError

ROOMS = {
    "polar": ("muonwire.cli.bench_polar", "every polar method against torch.optim.Muon's own function"),
    "processor": (
        "muonwire.cli.bench_processor",
        "what this processor multiplies fast, and what follows from it",
    ),
    "codec": (
        "muonwire.cli.bench_codec",
        "every codec: bits against error, and speed against DeMo's own scheme",
    ),
}
USAGE = "\n".join(
    [
        "usage: muonwire bench ROOM [options]",
        "",
        *(f"  {name}  {summary}" for name, (_, summary) in ROOMS.items()),
        "",
        "examples:",
        "  muonwire bench polar",
        "  muonwire bench polar --help",
        "  muonwire bench codec --chart codecs.png",
    ]
)


def main(args: Sequence[str]) -> int:
    """Run the bench of a room; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] not in ROOMS:
        raise UsageError(f"bench: {args[0]!r} is not a room with a bench; allowed are {', '.join(ROOMS)}")
    code: int = importlib.import_module(ROOMS[args[0]][0]).main(list(args[1:]))
    return code
