"""`muonwire bench ROOM`: measures a room of the library against its peers."""

from muonwire.cli.groups import Group

ACTIONS = {
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
main = Group(
    name="bench",
    arguments="ROOM [options]",
    actions=ACTIONS,
    examples=(
        "muonwire bench polar",
        "muonwire bench polar --help",
        "muonwire bench codec --chart codecs.png",
    ),
).main
