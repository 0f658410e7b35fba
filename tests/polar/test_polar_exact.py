import pytest
import torch

from muonwire.errors import UsageError
from muonwire.polar import (
    BASES,
    initial_state,
    orthonormal_basis,
    polar,
    power_iteration,
    quality,
)
from muonwire.polar.exact import qdwh
from tests.polar.polar_inputs import gaussian, with_values

SHAPES = [(40, 40), (40, 90), (90, 40), (2, 3, 12, 7)]


@pytest.mark.parametrize("method", ["svd", "eigh", "newton", "qdwh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_methods_agree(method, dtype, shape):
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x + 5 * torch.eye(*shape[-2:], dtype=torch.float64)
    wanted = polar(x, method="svd")
    # eigh squares the condition number, here up to about 1e2.
    tolerance = 2e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(polar(x.to(dtype), method=method).double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("method", "condition"), [("qdwh", 1e12), ("newton", 1e12), ("eigh", 1e5)])
def test_ill_conditioned(method, condition):
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), 30, dtype=torch.float64)
    left, right = (torch.linalg.qr(gaussian(30, 30, s).double())[0] for s in (0, 1))
    x = left * values @ right.mT
    q = polar(x, method=method)
    assert quality.orthogonality_error(q) < 1e-4
    assert quality.polar_error(q, x) < 1e-3


def test_qdwh_takes_a_lower_bound():
    x = gaussian(20, 20)
    torch.testing.assert_close(qdwh(x, lower=1e-4), qdwh(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", list(BASES))
@pytest.mark.parametrize("shape", SHAPES)
def test_bases_span_and_are_orthonormal(method, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = orthonormal_basis(x, method=method)
    q, x = (q, x) if shape[-2] >= shape[-1] else (q.mT, x.mT)
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).expand_as(q.mT @ q), rtol=0, atol=1e-3)
    torch.testing.assert_close(q @ (q.mT @ x), x, rtol=0, atol=1e-3)
    r = q.mT @ x
    assert (torch.diagonal(r, dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(r, r.triu(), rtol=0, atol=1e-3)


def test_gram_schmidt_loses_orthogonality_as_the_theory_says():
    x = with_values(torch.logspace(0, -4, 40).numpy(), 40)
    lost = {m: quality.orthogonality_error(orthonormal_basis(x, method=m)) for m in BASES}
    assert lost["householder"] < 1e-5 < lost["modified_gram_schmidt"] < 1e-2 < lost["classical_gram_schmidt"]


def test_dependent_columns_give_zeros():
    x = torch.ones(4, 3)
    for method in ("classical_gram_schmidt", "modified_gram_schmidt"):
        assert torch.equal(orthonormal_basis(x, method=method)[:, 1:], torch.zeros(4, 2))


def test_power_iteration_converges_with_its_state():
    x = with_values(torch.logspace(0, -2, 20).numpy(), 30)
    state = initial_state(x, rank=4)
    for _ in range(60):
        factors = power_iteration(x, state)
        state = factors.state
    left, _, right = torch.linalg.svd(x)
    torch.testing.assert_close(
        factors.left @ factors.left.mT, left[:, :4] @ left[:, :4].mT, rtol=0, atol=1e-3
    )
    torch.testing.assert_close(factors.update, left[:, :4] @ right[:4], rtol=0, atol=1e-2)


def test_power_iteration_of_zero_keeps_its_state():
    x = torch.zeros(2, 6, 8)
    state = initial_state(x, rank=3)
    factors = power_iteration(x, state)
    assert torch.equal(factors.left, torch.zeros(2, 6, 3))
    assert torch.equal(factors.state, state)


def test_quality_of_the_exact_factor():
    x = gaussian(12, 30)
    found = quality.quality(polar(x, method="svd"), x)
    assert found.polar_error < 1e-6
    assert max(found.orthogonality_error, found.orthogonality_max, found.orthogonality_spectral) < 1e-5
    assert found.alignment == pytest.approx(1, abs=1e-6)
    assert (found.rank, found.input_rank) == (12, 12)
    assert found.smallest == pytest.approx(1, abs=1e-5)
    assert found.largest == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: orthonormal_basis(torch.eye(2), method="nope"),
        lambda: initial_state(torch.eye(2), rank=3),
        lambda: power_iteration(torch.eye(3), torch.eye(2)),
        lambda: quality.polar_error(torch.eye(2), torch.eye(3)),
    ],
)
def test_bad_input_is_a_usage_error(call):
    with pytest.raises(UsageError):
        call()
