"""The table of frameworks in the docs: what it says was tested is installed, pinned and tested."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = {row["package"]: row for row in json.loads((ROOT / "docs" / "frameworks.json").read_text())}
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {
    re.match(r"[\w-]+", text)[0]
    for text in (*PROJECT["dependencies"], *EXTRAS["integrations"], *EXTRAS["train"])
}


@pytest.mark.parametrize("package", ROWS)
def test_a_row_is_of_what_is_installed_pinned_and_tested(package):
    # That of torch names its build, too.
    assert version(package).partition("+")[0] == PINNED[package]
    assert package in DECLARED
    test = ROOT / ROWS[package]["test"]
    assert re.search(rf"^\s*(from|import) {package}\b", test.read_text(), re.MULTILINE)
    shown = (ROOT / "docs" / "integrations.md").read_text()
    assert f"| {package} | {PINNED[package]} | " in shown


def test_every_framework_that_has_a_module_has_a_row():
    modules = {path.stem for path in (ROOT / "src" / "muonwire" / "integrations").glob("*.py")}
    assert {"accelerate", "lightning", "transformers"} <= modules & DECLARED <= set(ROWS)
