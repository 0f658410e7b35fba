"""The count of gradients that replicas in lockstep share."""

import pytest
import torch
from torch import nn

from muonwire.optim.gradients import GradientCount, are_finite


def backward(weight, factor=1.0):
    (factor * weight.sum()).backward()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("times", [1, 2])
def test_steps_and_gradients_thrown_away_count_however_often_they_are_zeroed(set_to_none, times):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    count = GradientCount()

    def zero():
        for _ in range(times):
            count.discard([weight], lambda: optimizer.zero_grad(set_to_none))

    zero()
    seen = []
    for steps in (True, True, False, True):
        backward(weight)
        if steps:
            count.take([weight])
        zero()
        seen.append(count.count)
    assert seen == [1, 2, 3, 4]


def test_a_gradient_counts_once_and_what_is_added_to_it_again():
    weight = nn.Parameter(torch.ones(3))
    count = GradientCount()
    backward(weight)
    count.take([weight])
    count.take([weight])
    assert count.count == 1
    backward(weight)
    count.take([weight])
    assert count.count == 2
    weight.grad = torch.ones(3)
    count.take([weight])
    assert count.count == 3
    weight.grad = None
    count.take([weight])
    assert count.count == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_what_has_finite_squares(dtype):
    fine = torch.full((3, 4), 300.0, dtype=dtype)
    assert are_finite([fine, fine.double()])
    for value in (float("nan"), float("inf"), -float("inf")):
        spoiled = fine.clone()
        spoiled[1, 2] = value
        assert not are_finite([fine, spoiled])
    if dtype in (torch.float32, torch.bfloat16):
        assert not are_finite([torch.full((2,), 1e20, dtype=dtype)])
