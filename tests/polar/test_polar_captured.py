"""Momentum of real training: spectra that no formula has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muonwire.polar import adaptive, polar
from muonwire.polar.bench import torch_muon
from muonwire.polar.quality import polar_error

CAPTURED = load_file(Path(__file__).parents[2] / "benchmarks" / "data" / "momentum.safetensors")


@pytest.mark.parametrize("name", list(CAPTURED))
def test_auto_is_no_less_accurate_than_torch(name):
    x = CAPTURED[name].float()
    assert polar_error(polar(x, dtype=torch.bfloat16), x) <= polar_error(torch_muon(x), x)


@pytest.mark.parametrize("error", [0.1, 0.02, 1e-3])
@pytest.mark.parametrize("name", list(CAPTURED))
def test_adaptive_delivers(name, error):
    x = CAPTURED[name].float()
    q, (report,) = adaptive(x, error=error)
    assert report.reached
    assert polar_error(q, x) <= error
