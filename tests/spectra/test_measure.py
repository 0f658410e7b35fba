"""Singular values and their measures."""

import math

import pytest
import torch

from muonwire.errors import UsageError
from muonwire.spectra.measure import measure, num_matrices, singular_values, spectrum
from tests.spectra.conftest import KINDS, build_small


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (40, 6), (6, 40), (1, 7), (1, 1)])
def test_singular_values_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    """Tall ones go through a QR decomposition."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    want = torch.linalg.svd(x.double()).S
    assert torch.allclose(singular_values("w", x), want, rtol=1e-12, atol=1e-12)


def test_measures_of_a_known_spectrum() -> None:
    """By hand: σ = 4, 2, 2."""
    found = spectrum(torch.tensor([2.0, 4.0, 2.0]), shape=(3, 9), eps=1e-7)
    assert found.condition == 2.0
    assert found.rank == 3
    assert found.stable_rank == pytest.approx(24 / 16 / 3)
    entropy = -(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25))
    assert found.effective_rank == pytest.approx(math.exp(entropy) / 3)
    q = (16 / 24, 4 / 24, 4 / 24)
    assert found.entropy == pytest.approx(-sum(p * math.log(p) for p in q) / math.log(3))
    assert found.frobenius == pytest.approx(math.sqrt(24))


def test_a_flat_spectrum_has_full_ranks() -> None:
    """Ratios are 1, and no tail."""
    found = spectrum(torch.full((8,), 3.0), shape=(8, 8), eps=1e-7)
    assert (found.condition, found.rank, found.tail) == (1.0, 8, math.inf)
    for ratio in (found.stable_rank, found.effective_rank, found.entropy):
        assert ratio == pytest.approx(1.0)


def test_the_tail_exponent_of_a_pareto_law_comes_back() -> None:
    """Eigenvalues at the quantiles of P(λ > x) = x^(1 − α)."""
    alpha, r = 3.0, 4000
    places = (torch.arange(r, dtype=torch.float64) + 0.5) / r
    eigenvalues = places ** (-1 / (alpha - 1))
    assert spectrum(eigenvalues.sqrt(), shape=(r, r), eps=1e-7).tail == pytest.approx(alpha, rel=0.02)


def test_rounding_does_not_count_as_rank() -> None:
    """A matrix of rank 3, rounded to bfloat16, has rank 3 at that dtype's resolution."""
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(20, 3, generator=g) @ torch.randn(3, 30, generator=g)).bfloat16()
    found = spectrum(singular_values("w", x), shape=(20, 30), eps=torch.finfo(torch.bfloat16).eps)
    assert found.rank == 3
    assert found.smallest > 0


def test_a_zero_matrix_has_rank_0() -> None:
    """A zero matrix has rank 0 and an infinite condition."""
    found = spectrum(torch.zeros(3), shape=(3, 3), eps=1e-7)
    assert (found.rank, found.condition) == (0, math.inf)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_measured_matrix_by_matrix(kind: str) -> None:
    """Every one once, the experts each, with its values."""
    model = build_small(kind)
    seen: list[str] = []
    found = measure(model, label=kind, step=seen.append)
    assert found.matrices["name"].to_list() == seen
    assert len(seen) == num_matrices(model) == len(set(seen))
    ranks = [min(row["rows"], row["columns"]) for row in found.matrices.iter_rows(named=True)]
    assert len(found.values) == sum(ranks)
    wanted = {
        "llama": {"attention", "mlp", "embedding", "head"},
        "tied": {"attention", "mlp", "embedding"},
        "gpt2": {"attention", "mlp", "embedding"},
        "mixtral": {"attention", "mlp", "router", "embedding", "head"},
    }
    assert set(found.matrices["group"]) == wanted[kind]
    experts = [n for n in seen if n.startswith("model.layers.0.mlp.experts")]
    # Four experts' gates, ups and downs: the first two are one tensor, and matrices of their own.
    assert len(experts) == (12 if kind == "mixtral" else 0)


def test_nan_is_refused_with_its_matrix() -> None:
    """Not as a message of LAPACK's."""
    model = build_small("llama")
    weight = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    weight.data[0, 0] = math.nan
    with pytest.raises(
        UsageError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 values of 1536 that are NaN"
    ):
        measure(model, label="x")
