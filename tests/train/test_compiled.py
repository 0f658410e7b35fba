import os
import shutil

import pytest
import torch
from torch import nn

from muonwire.errors import UsageError
from muonwire.train import compiled as module
from muonwire.train.compiled import compiled


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    with pytest.raises(
        UsageError, match=r"no C\+\+ compiler was found \(g\+\+, clang\+\+\).*leave out --compile"
    ):
        compiled(nn.Linear(2, 2), torch.device("cpu"))
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(UsageError, match="icpx"):
        compiled(nn.Linear(2, 2), torch.device("cpu"))


def test_each_instruction_set_has_a_cache_of_its_own(monkeypatch, tmp_path):
    widest = torch.backends.cpu.get_cpu_capability().lower()
    monkeypatch.delenv(module.CACHE, raising=False)
    compiled(nn.Linear(2, 2), torch.device("cpu"))
    own = os.environ[module.CACHE]
    assert own.endswith(f"_{widest}")
    compiled(nn.Linear(2, 2), torch.device("cpu"))
    assert os.environ[module.CACHE] == own
    monkeypatch.setenv(module.CACHE, str(tmp_path))
    compiled(nn.Linear(2, 2), torch.device("cpu"))
    assert os.environ[module.CACHE] == str(tmp_path)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, which a machine with build tools has")
def test_a_compiled_model_trains_the_models_own_parameters():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(model, torch.device("cpu"))(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        # The same few operations in another order: a few roundings of sums of at most 24 terms below 10.
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-5)
