"""The examples of docs/add.md, added as the page says: each file and its one line, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/muonwire")
BLOCK = re.compile(r'^```python title="(.+?)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)
EXAMPLES = BLOCK.findall((ROOT / "docs" / "add.md").read_text())
CHECKS = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "added_checks.py").read_text(), re.MULTILINE)


def is_table(name):
    return (ROOT / name).exists()


def test_every_example_is_one_file_and_at_most_one_line_in_a_table():
    lines = {name: code for name, code in EXAMPLES if is_table(name)}
    files = [name for name, _ in EXAMPLES if not is_table(name)]
    assert len(files) == 6
    assert sorted(Path(name).parent.name for name in lines) == ["codec", "recipes", "report", "tasks"]
    for name, code in lines.items():
        assert Path(name).name == "table.py"
        assert code.count("\n") == 1
    # What the lines import is what the files define.
    modules = {name.removeprefix("src/").removesuffix(".py").replace("/", ".") for name in files}
    assert {re.match(r"from (\S+) import (\w+) as \2$", code)[1] for code in lines.values()} <= modules


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What pytest says of the checks and of the tests that run over tables, with the examples added."""
    folder = tmp_path_factory.mktemp("added")
    # With the bytecode of what is not changed.
    shutil.copytree(ROOT / PACKAGE, folder / PACKAGE)
    for name, code in EXAMPLES:
        with (folder / name).open("a") as file:
            file.write(code)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--durations=0"),
            *("tests/added_checks.py", "tests/recipes/test_conformance.py"),
            *("-k", "added_checks or power_muon"),
        ],
        env={**os.environ, "PYTHONPATH": str(folder / "src"), "ADDED_CLAIM": str(folder / "rows.py")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_added_as_the_page_says_works(outcome, check):
    assert re.search(rf"^PASSED tests/added_checks\.py::{check}\b", outcome, re.MULTILINE), outcome
    assert not re.search(rf"^(FAILED|ERROR) tests/added_checks\.py::{check}\b", outcome, re.MULTILINE), (
        outcome
    )


def test_the_conformance_tests_find_the_recipe_in_the_table(outcome):
    passed = re.findall(
        r"^PASSED tests/recipes/test_conformance\.py::(\w+)\[[^\]]*power_muon", outcome, re.MULTILINE
    )
    assert len(set(passed)) >= 12, outcome
    assert "FAILED tests/recipes" not in outcome, outcome
