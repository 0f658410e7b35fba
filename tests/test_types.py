"""mypy on what a user of the library writes: one run of it, since it reads torch anew each time."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from muonwire import recipes
from tests.snippets import DOCUMENTS, STAND_INS, snippets

ROOT = Path(__file__).parents[1]
RIGHT = """
from torch import nn

from muonwire import recipes, stages
from muonwire.optim import ChainOptimizer
from muonwire.transport import SingleReplica

model = nn.Linear(2, 2)
optimizer: ChainOptimizer = recipes.one_bit_muon(model, lr=0.014, transport=SingleReplica(), interval=11)
optimizer = recipes.local_muon(model, lr=1, density=0.1, polar=["a"], exclude_buffers=("b",), schedule=None)
optimizer = recipes.adamw(model, lr=0.01, beta1=0.8)
clip: stages.Stage = stages.plain(lambda update: update.clamp(-1, 1), name="clip")
pull: stages.Stage = stages.plain(lambda update, param: update + param, name="pull")
"""
WRONG = {
    'recipes.muon(model, lr=0.1, start="brodcast")': "incompatible type \"Literal['brodcast']\"",
    "recipes.muon(model)": 'Missing named argument "lr"',
    "recipes.muon(lr=0.1)": "Too few arguments",
    "recipes.muon(model, 0.1)": "Too many positional arguments",
    "recipes.muon(model, lr=0.1, betas=(0.9, 0.99))": 'Unexpected keyword argument "betas"',
    'recipes.muon(model, lr="much")': 'Argument "lr" to "muon" has incompatible type "str"; expected "float"',
    "recipes.muon(model, lr=0.1, transport=1)": 'expected "Transport | None"',
    "recipes.muon([model], lr=0.1)": "expected Module",
    "recipes.one_bit_muon(model, lr=0.1, interval=2.5)": 'expected "int | str |',
    "recipes.one_bit_muon(model, lr=0.1, density=0.1)": 'Unexpected keyword argument "density"',
    "recipes.adamw(model, lr=0.1).rate": 'has no attribute "rate"',
}
FIRST_WRONG = len(RIGHT.splitlines()) + 1


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """By file: what `mypy --strict` says of its lines.

    The cache is that of `make check`, in which torch is known already.
    """
    folder = tmp_path_factory.mktemp("types")
    names = [f"recipes.{name}(nn.Linear(2, 2), lr=0.1).synchronize" for name in recipes.RECIPES]
    files = {
        "calls": [*RIGHT.splitlines(), *WRONG],
        "names": ["from torch import nn", "from muonwire import recipes", *names],
        **{Path(document).stem: snippets(document).splitlines() for document in DOCUMENTS},
    }
    (folder / "stand_ins.py").write_text(STAND_INS)
    for name, lines in files.items():
        (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    done = subprocess.run(
        [*command, *(str(folder / f"{name}.py") for name in files)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": f"src:{folder}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    found = defaultdict(list)
    for line in filter(None, done.stdout.splitlines()):
        found[Path(line.partition(":")[0]).stem].append(line)
    assert set(found) <= set(files), done.stdout
    return found


def test_mypy_knows_the_options(said):
    errors = [line for line in said["calls"] if ": error: " in line]
    by_line = {int(line.split(":")[1]): line for line in errors}
    assert set(by_line) == set(range(FIRST_WRONG, FIRST_WRONG + len(WRONG))), errors
    for line, (call, says) in enumerate(WRONG.items(), FIRST_WRONG):
        assert says in by_line[line], call


def test_mypy_knows_every_recipe(said):
    assert said["names"] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_mypy_accepts_the_snippets(document, said):
    assert said[Path(document).stem] == []
