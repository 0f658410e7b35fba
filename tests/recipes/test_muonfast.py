"""MuonFast of the note “Why MuonFast fails on vision transformers”, GDA2, and the stages that they brought."""

import pytest
import torch

from muonwire import recipes, stages
from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer
from muonwire.transport import SingleReplica
from tests.models import SmallNet, train, weights

HIDDEN = ("up.weight", "down.weight")


def steps_of(name, *, lr=0.01, steps=1, **options):
    """How far each weight has moved after ``steps``."""
    model = SmallNet()
    before = weights(model)
    train(model, recipes.build(name, model, lr=lr, **options), steps)
    return {n: before[n] - w for n, w in weights(model).items()}


def context(params, lr=0.1):
    layouts = [stages.MatrixLayout()] * len(params)
    return stages.Context(lr=lr, step=1, transport=SingleReplica(), layouts=layouts)


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_rate_inside_the_polar_factor_cancels_and_one_outside_does_not():
    inside = [steps_of("muonfast", lr=lr, rate_inside=True, method="svd") for lr in (1e-4, 0.1)]
    outside = [steps_of("muonfast", lr=lr, method="svd") for lr in (1e-3, 0.1)]
    for name in HIDDEN:
        assert torch.allclose(inside[0][name], inside[1][name], atol=1e-5)
        # The polar factor of a matrix with 8 columns or rows, one of which may have no gradient.
        assert 7**0.5 - 0.01 < inside[0][name].norm() < 8**0.5 + 0.01
        assert torch.allclose(100 * outside[0][name], outside[1][name], atol=1e-4)
        assert torch.allclose(0.1 * inside[1][name], outside[1][name], atol=1e-5)


@pytest.mark.parametrize("rate_inside", [True, False])
def test_a_rate_of_zero_moves_nothing(rate_inside):
    assert not any(step.any() for step in steps_of("muonfast", lr=0.0, rate_inside=rate_inside).values())


def test_with_adam_for_the_rest_and_muons_scale_it_is_muon():
    options = {"method": "svd", "weight_decay": 0.01}
    ours = steps_of("muonfast", steps=5, scale="rms", rest="adam", **options)
    for name, step in steps_of("muon", steps=5, **options).items():
        assert torch.allclose(ours[name], step, atol=1e-5), name


def test_with_a_threshold_above_all_matrices_it_is_sgd():
    ours = steps_of("muonfast", steps=5, polar_at_least=128)
    for name, step in steps_of("sgd", steps=5, momentum=0.95).items():
        assert torch.equal(ours[name], step), name


def test_keeping_the_norm_changes_the_direction_only():
    plain, kept = steps_of("sgd", momentum=0.95), steps_of("muonfast", keep_norm=True, method="svd")
    direction = steps_of("muonfast", method="svd")
    for name in HIDDEN:
        assert kept[name].norm() == pytest.approx(plain[name].norm().item(), rel=1e-3)
        cosine = (kept[name] * direction[name]).sum() / kept[name].norm() / direction[name].norm()
        assert cosine == pytest.approx(1, abs=1e-3)


def test_its_scale_for_small_matrices():
    plain, scaled = steps_of("muonfast", method="svd"), steps_of("muonfast", method="svd", scale="small")
    for name in HIDDEN:
        assert torch.allclose(scaled[name], plain[name] * (8 / 256) ** 2, atol=1e-7)


def test_a_preconditioner_after_the_polar_factor_makes_all_entries_of_the_first_step_alike():
    for step in (steps_of("muonfast", preconditioner="after")[name] for name in HIDDEN):
        assert ((step.abs() - 0.01).abs() < 1e-4).float().mean() > 0.8


def test_large_only_leaves_small_matrices_as_they_are():
    params = [made(4, 9), made(8, 8), made(9, 5)]
    stage = stages.LargeOnly(stage=stages.Sign(), at_least=5)
    results = stage.apply(params, params, [{}, {}, {}], context(params))
    assert torch.equal(results[0], params[0])
    assert torch.equal(results[1], params[1].sign())
    assert torch.equal(results[2], params[2].sign())


def solve_quadratic(*, lr=0.3, steps=9, **options):
    """Distance from the minimum of ½ Σ a x² with a = 0.1, 1, 3, whose gradient is the residual."""
    curvature = torch.tensor([[0.1, 1.0, 3.0]], dtype=torch.float64)
    weight = torch.nn.Parameter(torch.ones(1, 3, dtype=torch.float64))
    stage = stages.chain(*([stages.Anderson(**options)] if options else [stages.Momentum(beta=0.0)]))
    optimizer = ChainOptimizer([weight], chain=stage, lr=lr)
    for _ in range(steps):
        weight.grad = curvature * weight.detach()
        optimizer.step()
    return weight.detach().norm().item()


def test_anderson_mixing_solves_a_linear_problem_of_as_many_dimensions_as_its_history():
    assert solve_quadratic(history=3, regularization=1e-9, cap=1e9) < 1e-4
    assert solve_quadratic() > 0.7


def test_much_regularization_leaves_the_plain_step():
    assert solve_quadratic(regularization=1e12) == pytest.approx(solve_quadratic(), rel=1e-6)
    ours, plain = steps_of("gda2", steps=5, regularization=1e9), steps_of("adamw", steps=5)
    for name, step in plain.items():
        assert torch.allclose(ours[name], step, atol=1e-6), name


def test_a_mixed_step_is_bounded_and_is_the_written_out_formula():
    stage = stages.Anderson(history=2, regularization=0.5, decay=0.9, cap=1.5)
    updates, points = [made(3, 4, seed=s) for s in range(3)], [made(3, 4, seed=s) for s in range(10, 13)]
    (free,) = [stages.Anderson(history=2, regularization=0.5, decay=0.9, cap=1e9)]
    states, free_states = [stage.init(points[0])], [free.init(points[0])]
    for update, point in zip(updates, points, strict=True):
        (got,) = stage.apply([update], [point], states, context([point]))
        (unbounded,) = free.apply([update], [point], free_states, context([point]))
    differences = torch.stack([(updates[i + 1] - updates[i]).flatten() for i in range(2)], dim=1)
    moves = torch.stack([(points[i + 1] - points[i]).flatten() for i in range(2)], dim=1)
    squares = differences.square().sum(dim=0)
    penalty = 0.5 * (0.9 * squares[0] + squares[1]) / 1.9
    last = updates[2].flatten()
    gamma = torch.linalg.solve(differences.T @ differences + penalty * torch.eye(2), differences.T @ last)
    wanted = (last - differences @ gamma + moves @ gamma / 0.1).view(3, 4)
    assert torch.allclose(unbounded, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.norm() > 1.5 * updates[2].norm()
    assert torch.allclose(got, wanted * (1.5 * updates[2].norm() / wanted.norm()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"preconditioner": "both"}, "allowed are none, before and after"), ({"rest": "lion"}, "sgd and adam")],
)
def test_bad_options_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        recipes.build("muonfast", SmallNet(), lr=0.01, **options)
