"""Rules of the architecture that the import linter cannot see."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "muonwire"


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ["codec", "polar", "stages", "optim", "recipes", "tasks"])
def test_only_exchange_and_train_know_torch_distributed(room):
    for path in (SOURCE / room).rglob("*.py"):
        assert not [name for name in imported(path) if name.startswith("torch.distributed")], path


def test_the_library_imports_without_the_extras():
    code = (
        "import sys\n"
        "import muonwire.recipes, muonwire.codec, muonwire.polar, muonwire.transport\n"
        "extras = {'transformers', 'tokenizers', 'tyro', 'rich', 'polars', 'altair', 'vl_convert', 'jinja2', 'safetensors'}\n"
        "print(sorted(extras & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_longer_than_500_lines():
    assert [p.name for p in SOURCE.rglob("*.py") if len(p.read_text().splitlines()) > 500] == []
