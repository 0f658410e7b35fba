"""Momentum of real training: spectra that no formula has."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muonwire.bench.polar import torch_muon
from muonwire.polar import SCHEDULES, adaptive, polar
from muonwire.polar.gram import gram_iteration
from muonwire.polar.quality import exact_factor, polar_error
from tests.slow import slow_unless

CAPTURED = load_file(Path(__file__).parents[2] / "benchmarks" / "data" / "momentum.safetensors")


@pytest.mark.parametrize("name", list(CAPTURED))
def test_auto_is_no_less_accurate_than_torch(name):
    x = CAPTURED[name].float()
    assert polar_error(polar(x, dtype=torch.bfloat16), x) <= polar_error(torch_muon(x), x)


@pytest.mark.parametrize(
    ("name", "error"),
    slow_unless(
        lambda index, name, error: index % 2 == 0,
        [(name, error) for name in CAPTURED for error in (0.1, 0.02, 1e-3)],
    ),
)
def test_adaptive_delivers(name, error):
    x = CAPTURED[name].float()
    q, (report,) = adaptive(x, error=error)
    assert report.reached
    assert polar_error(q, x) <= error


def heavy():
    """Matrices that a few rows, columns or entries dominate, so that σ_max is nearly ‖X‖_F and rounding does not average out."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for m, n in ((128, 512), (256, 256), (512, 128)):
        x = torch.randn(m, n, generator=generator)
        rows, columns = torch.randn(m, 1, generator=generator), torch.randn(1, n, generator=generator)
        made[f"rows {m}x{n}"] = x * (3 * rows).exp()
        made[f"rows and columns {m}x{n}"] = x * (2 * rows).exp() * (2 * columns).exp()
        made[f"one row {m}x{n}"] = torch.cat([1e3 * x[:1], x[1:]])
        made[f"spike {m}x{n}"] = x.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(1e4))
    return made


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_gram_form_is_as_good_as_the_plain_one_whatever_dominates(schedule):
    for name, matrix in (CAPTURED | heavy()).items():
        x = matrix.float()
        exact = exact_factor(x)
        plain, gram = (
            polar_error(polar(x, method=method, schedule=schedule), x, exact=exact)
            for method in ("newton_schulz", "gram")
        )
        assert plain < 1.1, name
        # Restarts are placed for a relative rounding error of at most 0.1.
        assert gram <= plain + 0.1, name


@pytest.mark.parametrize("restarts", [(2,), (1, 3), (2, 4), (1, 2, 4), (2, 3, 4)])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_wherever_the_gram_form_restarts_it_is_the_same_polynomial(restarts, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x /= torch.linalg.matrix_norm(x, 2)
    schedule = SCHEDULES["jordan"]
    whole = gram_iteration(x, schedule=schedule, restarts=(1, 2, 3, 4)).clone()
    assert torch.allclose(gram_iteration(x, schedule=schedule, restarts=restarts), whole, atol=1e-10)
