"""Approach D by measurement."""

import pytest
import torch

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.recipes.choose import choose_dense, lost_shares
from tests.lockstep import lockstep
from tests.models import SmallNet

# up is (12, 8), down (8, 12): half of the hidden parameters each.
OPTIONS = {"codec": "topk(density=0.25) | float32"}


def with_gradients(spread="up"):
    """A gradient whose entries are alike, of which a codec drops most, and one of few entries."""
    model = SmallNet()
    for name, p in model.named_parameters():
        p.grad = torch.zeros_like(p)
        if name == f"{spread}.weight":
            p.grad.fill_(-2.0)
        elif p.ndim == 2:
            p.grad[0] = 3.0
    return model


@pytest.mark.parametrize("spread", ["up", "down"])
def test_the_matrix_that_the_codec_drops_most_of_travels_dense(spread):
    model = with_gradients(spread)
    shares = lost_shares(model, **OPTIONS)
    other = {"up": "down", "down": "up"}[spread]
    assert shares == {f"{spread}.weight": 0.75, f"{other}.weight": 0.0}
    dense = choose_dense(model, share=0.6, **OPTIONS)
    optimizer = recipes.build("approach_d", model, lr=0.1, dense=dense, **OPTIONS)
    assert optimizer.param_groups[0]["names"] == [f"{spread}.weight"]


def test_replicas_with_other_gradients_choose_the_same():
    def choice(transport):
        model = with_gradients("down" if transport.rank == 1 else "up")
        shares = lost_shares(model, **OPTIONS, transport=transport)
        return shares, choose_dense(model, share=0.5, **OPTIONS, transport=transport)

    results = lockstep(choice, 3)
    assert results == [({"up.weight": 0.5, "down.weight": 0.25}, [r"^up\.weight$"])] * 3


def test_all_of_it_is_every_hidden_matrix_and_a_zero_gradient_loses_nothing():
    model = with_gradients()
    model.up.weight.grad.zero_()
    assert lost_shares(model, **OPTIONS)["up.weight"] == 0
    assert len(choose_dense(model, share=1.0, **OPTIONS)) == 2


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_shares_do_not_depend_on_the_scale(scale):
    model = with_gradients()
    for p in model.parameters():
        p.grad *= scale
    assert lost_shares(model, **OPTIONS)["up.weight"] == pytest.approx(0.75, rel=1e-5)


def no_gradient(model):
    model.up.weight.grad = None


def infinite(model):
    model.up.weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize(
    ("share", "damage", "says"),
    [
        (0.0, None, r"must lie in \(0, 1\]"),
        (0.1, None, "less than the smallest matrix, which has 96"),
        (0.5, no_gradient, "up.weight has no gradient; call backward"),
        (0.5, infinite, "up.weight is not finite on at least one replica"),
    ],
)
def test_what_cannot_be_measured_says_why(share, damage, says):
    model = with_gradients()
    if damage:
        damage(model)
    with pytest.raises(UsageError, match=says):
        choose_dense(model, share=share, **OPTIONS)
