"""What the claims of the note "Muon from the top down" are measured with, against independent ways to the same figure."""

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from muonwire.lab.claims.top_down import ill_conditioned_weights
from muonwire.lab.engine.catalog import load_claims
from muonwire.lab.measures import random_matrices
from muonwire.lab.measures.chains import COURSES, steps_to_target
from muonwire.lab.measures.gauss_newton import (
    condition_of,
    derived_blocks,
    gauss_newton,
    largest_over,
    measured_block,
    with_condition,
    with_power,
)
from muonwire.lab.measures.matrices import fitted_power
from muonwire.lab.measures.orthogonalizing import conditioned
from muonwire.lab.measures.small_llama import small_llama, steps_needed

DOCS = Path(__file__).parents[2] / "docs"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    share = float(random_matrices.edelman_cdf(np.asarray(t)))
    assert share == pytest.approx(quad(density, 0, t**2)[0], rel=1e-6)
    assert random_matrices.edelman_quantile(share) == pytest.approx(t)


@pytest.mark.parametrize(("n", "known"), [(2, 1), (3, 10), (4, 338), (5, 42976)])
def test_as_many_sign_matrices_are_singular_as_is_known(n, known):
    # Those of size n with a first row and column of +1 are as many as 0-1 matrices of size n − 1: OEIS A046747.
    assert int(random_matrices.is_singular(random_matrices.all_signs(n)).sum()) == known


def test_singular_signs_are_told_exactly():
    generator = torch.Generator().manual_seed(1)
    signs = 2 * torch.randint(0, 2, (40, 10, 10), generator=generator) - 1
    exact = [singular(one.tolist()) for one in signs]
    assert random_matrices.is_singular(signs).tolist() == exact
    assert any(exact)
    assert not all(exact)


def test_drawn_rounding_is_as_large_as_rounding():
    x = drawn(96, 96)
    taken = float(torch.linalg.matrix_norm(x.bfloat16().double() - x, 2))
    found = random_matrices.rounding_norm(x, torch.Generator().manual_seed(2))
    # Two draws of a norm that varies by a few percent at this size.
    assert found == pytest.approx(taken, rel=0.15)
    assert random_matrices.rounding_norm(4 * x, torch.Generator().manual_seed(2)) == pytest.approx(4 * found)
    assert random_matrices.rounding_norm(torch.zeros(3, 3), torch.Generator()) == 0.0


def test_numerical_rank_is_lost_at_the_resolution():
    values = torch.tensor([[1.0, 1e-6], [1.0, 1e-8]], dtype=torch.float64)
    assert random_matrices.full_rank(values, size=2, dtype=torch.float32).tolist() == [True, False]


def test_a_power_is_fitted():
    assert fitted_power([(x, 3 * x**-0.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(-0.5)


def test_the_made_matrix_has_the_condition():
    values = torch.linalg.svdvals(conditioned(12, 1e5, torch.Generator().manual_seed(0)))
    assert float(values[0]) == pytest.approx(1.0)
    assert float(values[0] / values[-1]) == pytest.approx(1e5, rel=1e-6)
    ratios = values[:-1] / values[1:]
    assert float(ratios.max() / ratios.min()) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_powers_of_singular_values_keep_the_norm_and_the_vectors(shape):
    x = drawn(*shape)
    flat, same, steep = (with_power(x, p) for p in (0.0, 1.0, 2.0))
    assert float(torch.linalg.cond(flat)) == pytest.approx(1.0)
    torch.testing.assert_close(same, x)
    assert float(torch.linalg.cond(steep)) == pytest.approx(float(torch.linalg.cond(x)) ** 2)
    for changed in (flat, steep):
        assert float(changed.norm()) == pytest.approx(float(x.norm()))
        # The same singular vectors: both products are symmetric.
        torch.testing.assert_close(x @ changed.mT, changed @ x.mT)
        torch.testing.assert_close(x.mT @ changed, changed.mT @ x)


def test_a_condition_is_set_at_the_same_norm():
    x = drawn(8, 8)
    changed = with_condition(x, 30.0)
    assert float(torch.linalg.cond(changed)) == pytest.approx(30.0)
    assert float(changed.norm()) == pytest.approx(float(x.norm()))


def test_conditions_of_blocks():
    block = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5], dtype=torch.float64))
    assert condition_of(block) == 16.0
    assert largest_over(block, 0.5) == 4.0
    block[0, 0] = 0.0
    assert condition_of(block) == math.inf
    assert math.isfinite(largest_over(block, 0.0))


def test_where_logits_are_linear_the_gauss_newton_block_is_the_hessian():
    weight, x, targets = drawn(5, 3), drawn(7, 3, seed=1), torch.arange(7) % 5

    def loss(w):
        return torch.nn.functional.cross_entropy(x @ w.view(5, 3).mT, targets)

    hessian = torch.func.hessian(loss)(weight.flatten())
    p = torch.softmax(x @ weight.mT, dim=-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    jacobian = torch.einsum("oc,si->soci", torch.eye(5, dtype=torch.float64), x).flatten(2)
    torch.testing.assert_close(gauss_newton(jacobian, curvature), hessian)


@pytest.fixture(scope="module")
def llama():
    model = small_llama(width=8, seed=0)
    # At the usual small start the branches hardly reach the logits.
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(10)
    return model.requires_grad_(False), torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layer", list(ill_conditioned_weights.BLOCKS))
def test_the_derivation_holds_on_a_llama(llama, layer):
    model, tokens = llama
    measured, derived = measured_block(model, layer, tokens), derived_blocks(model, layer, tokens)
    errors = {f: float((b - measured).norm() / measured.norm()) for f, b in derived.items()}
    # Products in float32, in another order.
    assert errors["all positions"] < 1e-4
    # After the last attention a position's output reaches its own logits alone; before it others too.
    assert (errors["own position"] < 1e-4) == layer.startswith("layers.1")
    assert errors["factored"] > 0.01


def test_the_measured_block_is_that_of_the_loss(llama):
    """Its quadratic form is the second derivative of KL(p₀ ‖ p) along a change of the weight: Fisher's, which is Gauss-Newton's."""
    model, tokens = llama
    layer = ill_conditioned_weights.CHANGED
    name = f"model.{layer}.weight"
    weight = dict(model.named_parameters())[name].detach()
    block = measured_block(model, layer, tokens)
    direction = drawn(*weight.shape).float()
    start = torch.log_softmax(model(input_ids=tokens).logits.double(), dim=-1)
    step = 0.02
    moved = []
    for sign in (-1, 1):
        changed = {name: weight + sign * step * direction}
        logits = torch.func.functional_call(model, changed, kwargs={"input_ids": tokens}).logits
        after = torch.log_softmax(logits.double(), dim=-1)
        moved.append(float((start.exp() * (start - after)).sum(-1).mean()))
    flat = direction.flatten().double()
    assert sum(moved) / step**2 == pytest.approx(float(flat @ block @ flat), rel=0.05)


def test_a_layers_own_condition_does_not_slow_it_and_its_neighbours_do():
    below, _, own = COURSES[:3]
    rates = torch.logspace(-4, 1, 6, base=2.0, dtype=torch.float64)
    made = {"rates": rates, "most": 60}
    for course, slowed in ((own, False), (below, True)):
        easy, hard = steps_to_target(course, (1.0, 10.0), generator=torch.Generator().manual_seed(0), **made)
        assert (hard > 2 * easy) == slowed


def test_steps_are_counted_to_where_the_slowest_start_ends():
    falling = [1.0 - 0.01 * i for i in range(60)]
    slow = [1.0 - 0.005 * i for i in range(60)]
    diverged = [1.0] * 5 + [math.nan] * 55
    needed = steps_needed({0.0: [diverged, falling], 3.0: [slow, diverged]})
    assert needed[3.0] == 60
    # The smoothed target is slow's mean over its last ten, 0.7275, which falling's mean passes at half the slope.
    assert needed[0.0] == 33


@pytest.mark.parametrize("page", ["conditioning.md", "random_matrices.md"])
def test_the_derivations_name_claims_that_there_are(page):
    text = (DOCS / page).read_text()
    named = set(re.findall(r"muonwire lab run (\w+\.\d)", text))
    assert named
    assert named <= set(load_claims())
