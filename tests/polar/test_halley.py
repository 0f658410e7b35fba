"""A Halley step and a quintic: what they make of singular values, in both forms, at any scale, and what they cost."""

import numpy as np
import pytest
import torch

from muonwire.bench.polar import torch_muon
from muonwire.errors import UsageError
from muonwire.polar import count_products, explain, polar, set_processor
from muonwire.polar.halley import (
    HALLEY_ERROR,
    LOWER,
    halley,
    halley_cost,
    halley_flops,
    halley_map,
    halley_polar,
    in_gram_form,
)
from muonwire.polar.quality import exact_factor, polar_error
from muonwire.polar.schedules import JORDAN
from tests.polar.polar_inputs import SPECTRA, gaussian, spectrum

SHAPES = [(24, 24), (24, 60), (60, 24), (1, 5), (5, 1)]


def with_values(values, m, n):
    generator = torch.Generator().manual_seed(1)
    r = len(values)
    left = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64))[0]
    return (left * torch.as_tensor(values, dtype=torch.float64)) @ right.mT


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)])
def test_singular_values_go_where_the_map_says(shape):
    values = np.geomspace(1e-4, 1, 24)
    made = torch.linalg.svdvals(halley(with_values(values, *shape)))
    np.testing.assert_allclose(made.numpy(), np.sort(halley_map(values))[::-1], atol=1e-6)
    scaled = torch.linalg.svdvals(halley(3 * with_values(values, *shape), upper=3.0))
    np.testing.assert_allclose(scaled.numpy(), made.numpy(), atol=1e-6)


def test_the_error_is_the_stated_one_and_below_it_more_is_grown_than_by_torch():
    error = np.abs(1 - halley_map(np.geomspace(LOWER, 1, 100_001))).max()
    assert HALLEY_ERROR - 0.001 < error < HALLEY_ERROR
    tiny = np.array([1e-7])
    assert halley_map(tiny) / tiny == pytest.approx(964, abs=1)
    assert JORDAN.apply(tiny) / tiny == pytest.approx(485, abs=1)


@pytest.mark.parametrize("name", list(SPECTRA))
def test_no_worse_than_torch_on_any_spectrum(name):
    x = spectrum(name)
    exact = exact_factor(x)
    ours = polar_error(polar(x, method="halley"), x, exact=exact)
    assert ours <= polar_error(torch_muon(x), x, exact=exact)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e25])
def test_any_scale_and_orientation(shape, scale):
    x = gaussian(*shape)
    wanted = halley_polar(x.double(), dtype=torch.float64)
    torch.testing.assert_close(
        halley_polar(x * scale, dtype=torch.float32), wanted.float(), atol=2e-3, rtol=0
    )
    stacked = halley_polar(torch.stack([x * scale, x, -x]).unsqueeze(0), dtype=torch.float32)
    assert stacked.shape == (1, 3, *shape)
    torch.testing.assert_close(stacked[0, 2], -wanted.float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)])
def test_what_is_not_finite_is_nan_in_its_own_matrix_only(bad, shape):
    x = torch.stack([gaussian(*shape, seed) for seed in range(3)])
    x[1, 2, 3] = bad
    made = halley_polar(x, dtype=torch.float32)
    assert made[1].isnan().all()
    assert made[[0, 2]].isfinite().all()
    with pytest.raises(UsageError, match="not finite"):
        polar(x, method="halley")


def test_zeros_stay_zeros_and_rank_deficient_ones_stay_small():
    x = torch.zeros(2, 8, 30)
    x[1] = with_values([1.0, 0.5], 8, 30).float()
    made = halley_polar(x, dtype=torch.float32)
    assert not made[0].any()
    assert torch.linalg.svdvals(made[1])[2:].max() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_are_counted_exactly(shape):
    with count_products() as count:
        halley(gaussian(*shape) / 100)
    assert count.flops == halley_flops(*shape) <= halley_cost(*shape)
    with count_products() as count:
        halley(gaussian(*shape).expand(3, 2, *shape) / 100)
    assert count.flops == 6 * halley_flops(*shape)


def test_sixteen_bits_are_refused():
    with pytest.raises(UsageError, match="allowed are float32 and float64"):
        polar(torch.eye(3), method="halley", dtype=torch.bfloat16)
    assert polar(torch.eye(3, dtype=torch.bfloat16), method="halley").dtype == torch.bfloat16


@pytest.fixture
def as_avx2():
    set_processor("avx2")
    yield
    set_processor(None)


@pytest.mark.usefixtures("as_avx2")
def test_a_measured_spectrum_takes_it_where_no_plan_is_cheaper():
    easy, hard = gaussian(256, 1024), with_values(1 / np.arange(1, 257), 256, 1024).float()
    assert in_gram_form(256, 1024)
    assert explain(easy, dtype=torch.float32).report.plans
    told = explain(hard, dtype=torch.float32)
    assert told.report.plans == ()
    assert "a Halley step and a quintic" in told.reason
    assert told.report.expected_error < told.report.reference_error
    reached = polar_error(polar(hard, dtype=torch.float32), hard)
    assert reached == pytest.approx(told.report.expected_error, abs=0.05)
    with count_products() as count:
        polar(hard, dtype=torch.float32)
    assert count.matrix_flops == told.report.flops == halley_flops(256, 1024)
