"""The Python in the documents: mypy accepts it, and it runs."""

import socket
from pathlib import Path

import pytest
import torch

from muonwire.optim import ChainOptimizer
from tests.type_check import type_check

ROOT = Path(__file__).parents[1]
# Of each document: what its snippets use without making it, and whether a process group is made by it or for it.
DOCUMENTS = {
    "README.md": "from stand_ins import data, loss, model",
    "docs/one_bit_muon.md": "from stand_ins import model, transport",
    "docs/optimizer.md": "from stand_ins import model, transport",
    "docs/own_loop.md": "# It makes all that it uses.",
    "docs/choose.md": "from stand_ins import model",
    "docs/prometheus.md": "from stand_ins import data, loss, model",
    "docs/links.md": "from stand_ins import data, loss, model, transport",
}
STAND_INS = '''"""A model, its loss, and a replica's data."""

import torch
from torch import Tensor, nn

from muonwire.transport import SingleReplica, Transport

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
data: list[Tensor] = [torch.randn(8, 4) for _ in range(12)]
transport: Transport = SingleReplica()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    prediction: Tensor = model(batch)
    return (prediction - batch).square().mean()
'''


def snippets(document):
    """The Python of a document, each line at its number there; the first line imports what is not made."""
    code, inside = [DOCUMENTS[document]], False
    for line in (ROOT / document).read_text().splitlines()[1:]:
        fence = line.startswith("```")
        code.append(line if inside and not fence else "")
        inside = line == "```python" or (inside and not fence)
    # PyTorch itself leaves the functions untyped that backward and init_process_group are. Said here rather than by an option of
    # mypy's, which would make it read torch anew.
    return "\n".join([*code, "# mypy: allow-untyped-calls"]) + "\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    return tmp_path


def test_mypy_accepts_the_snippets(folder):
    files = [folder / f"{Path(document).stem}.py" for document in DOCUMENTS]
    for file, document in zip(files, DOCUMENTS, strict=True):
        file.write_text(snippets(document))
    assert type_check(*files) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_snippets_run_with_one_replica(document, folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    monkeypatch.delitem(__import__("sys").modules, "stand_ins", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    names = {}
    try:
        exec(compile(snippets(document), document, "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if document == "README.md":
        assert "hidden: 2 tensors" in capsys.readouterr().out
    assert any(isinstance(made, ChainOptimizer) and made.param_groups for made in names.values())
