"""The Python in the documents runs. That mypy accepts it is in test_types.py."""

import socket

import pytest
import torch

from muonwire.optim import ChainOptimizer
from tests.snippets import DOCUMENTS, STAND_INS, snippets


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    return tmp_path


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
