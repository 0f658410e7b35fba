"""Edelman’s law, singular sign matrices and the norm of rounding, each against another way to the same figure."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from muonwire.lab.claims.top_down import gaussian_rank
from tests.lab.matrices import drawn


def singular(rows: list[list[int]]) -> bool:
    """By elimination in exact arithmetic."""
    left = [[Fraction(v) for v in row] for row in rows]
    while left:
        pivot = next((row for row in left if row[0]), None)
        if pivot is None:
            return True
        left.remove(pivot)
        left = [[v - row[0] / pivot[0] * p for v, p in zip(row[1:], pivot[1:], strict=True)] for row in left]
    return False


@pytest.mark.parametrize("t", [0.1, 0.5447, 2.0])
def test_edelmans_cdf_is_the_integral_of_his_density(t):
    density = lambda x: (1 + math.sqrt(x)) / (2 * math.sqrt(x)) * math.exp(-(x / 2 + math.sqrt(x)))  # noqa: E731
    share = float(gaussian_rank.edelman_cdf(np.asarray(t)))
    assert share == pytest.approx(quad(density, 0, t**2)[0], rel=1e-6)
    assert gaussian_rank.edelman_quantile(share) == pytest.approx(t)


@pytest.mark.parametrize(("n", "known"), [(2, 1), (3, 10), (4, 338), (5, 42976)])
def test_as_many_sign_matrices_are_singular_as_is_known(n, known):
    # Those of size n with a first row and column of +1 are as many as 0-1 matrices of size n − 1: OEIS A046747.
    assert int(gaussian_rank.is_singular(gaussian_rank.all_signs(n)).sum()) == known


def test_singular_signs_are_told_exactly():
    generator = torch.Generator().manual_seed(1)
    signs = 2 * torch.randint(0, 2, (40, 10, 10), generator=generator) - 1
    exact = [singular(one.tolist()) for one in signs]
    assert gaussian_rank.is_singular(signs).tolist() == exact
    assert any(exact)
    assert not all(exact)


def test_drawn_rounding_is_as_large_as_rounding():
    x = drawn(96, 96)
    taken = float(torch.linalg.matrix_norm(x.bfloat16().double() - x, 2))
    found = gaussian_rank.rounding_norm(x, torch.Generator().manual_seed(2))
    # Two draws of a norm that varies by a few percent at this size.
    assert found == pytest.approx(taken, rel=0.15)
    assert gaussian_rank.rounding_norm(4 * x, torch.Generator().manual_seed(2)) == pytest.approx(4 * found)
    assert gaussian_rank.rounding_norm(torch.zeros(3, 3), torch.Generator()) == 0.0


def test_numerical_rank_is_lost_at_the_resolution():
    values = torch.tensor([[1.0, 1e-6], [1.0, 1e-8]], dtype=torch.float64)
    assert gaussian_rank.full_rank(values, size=2, dtype=torch.float32).tolist() == [True, False]
