"""Commands that are several: every action is there, with its help, and is loaded only when it is called."""

import subprocess
import sys

import pytest

from muonwire.cli import bench, lab, main, spectra
from muonwire.cli.groups import Group, listing
from muonwire.errors import UsageError

GROUPS = {"bench": bench, "lab": lab, "spectra": spectra}
ACTIONS = [(group, action) for group, of in GROUPS.items() for action in of.ACTIONS]


@pytest.mark.parametrize(("group", "action"), ACTIONS, ids=" ".join)
def test_every_action_has_help_with_examples(capsys, group, action):
    with pytest.raises(SystemExit) as ended:
        main.main([group, action, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"muonwire {group} {action}" in shown.split("examples:")[1]


def test_an_action_is_run_with_the_arguments_behind_it(monkeypatch):
    called = []
    monkeypatch.setattr("muonwire.cli.recipes.main", lambda args: called.append(args) or 3)
    group = Group(
        name="few", arguments="ACTION", actions={"one": ("muonwire.cli.recipes", "it")}, examples=()
    )
    assert group.main(["one", "--a", "b"]) == 3
    assert called == [["--a", "b"]]
    with pytest.raises(UsageError, match="few: 'two' is not an action; allowed are one"):
        group.main(["two"])


def test_the_usage_without_an_action_is_no_success(capsys):
    assert lab.main([]) == 2
    assert lab.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: muonwire lab ACTION")


def test_a_listing_is_aligned():
    assert listing({"a": ("m", "one"), "longer": ("m", "two")}) == ["  a       one", "  longer  two"]


def test_the_command_line_starts_without_what_its_commands_need():
    """So that `muonwire --version`, and what is missing, are shown where only the library is installed."""
    code = (
        "import sys, muonwire.cli.main; print([m for m in ('torch', 'tyro', 'polars') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
