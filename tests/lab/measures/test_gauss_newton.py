"""Gauss–Newton blocks against the Hessian, the derivation and the loss itself."""

import math
from pathlib import Path

import pytest
import torch

from muonwire.lab.claims.top_down import ill_conditioned_weights
from muonwire.lab.engine.claim import Setting
from muonwire.lab.measures.gauss_newton import (
    condition_of,
    derived_blocks,
    gauss_newton,
    largest_over,
    measured_block,
    with_condition,
    with_power,
)
from tests.lab.matrices import drawn


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
    model = ill_conditioned_weights.small_llama(Setting(seed=0, quick=True, folder=Path()))
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
