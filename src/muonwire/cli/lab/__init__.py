"""`muonwire lab`."""

from muonwire.cli.groups import Group

ACTIONS = {
    "list": ("muonwire.cli.lab.list", "the claims: id, the note that makes it, what the note says"),
    "run": ("muonwire.cli.lab.run", "measure claims and write the page of their verdicts"),
    "report": ("muonwire.cli.lab.report", "write the page again from what is measured"),
}
main = Group(
    name="lab",
    arguments="ACTION [IDS] [options]",
    actions=ACTIONS,
    examples=(
        "muonwire lab list",
        "muonwire lab run --all",
        "muonwire lab run conflict.1 vit --out runs/lab",
        "muonwire lab run --help",
    ),
).main
