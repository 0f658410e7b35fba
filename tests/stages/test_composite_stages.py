"""Stages that hold stages, take several rounds, or look at the weights."""

import pytest
import torch

from muonwire import codec, stages
from muonwire.errors import UsageError
from muonwire.polar import polar
from tests.stages.lockstep import context, run_lockstep


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def init(stage, params, replicas):
    return [[stage.init(p) for p in params] for _ in range(replicas)]


def low_rank(rank, seed):
    return made(12, rank, seed=seed) @ made(rank, 20, seed=seed + 1)


class Doubled(stages.Stage):
    def init(self, param):
        return {"count": 0}

    def apply(self, updates, params, states, context):
        for state in states:
            state["count"] += 1
        return [2 * u for u in updates]

    def __str__(self):
        return "doubled"


def test_every_takes_its_full_stage_each_period_and_keeps_the_states_apart():
    stage = stages.Every(period=3, full=Doubled(), otherwise=stages.Momentum(beta=0.0))
    params = [made(3, 4)]
    (states,) = init(stage, params, 1)
    for step in range(1, 7):
        (result,) = stage.apply([made(3, 4)], params, states, context(params, step=step))
        assert torch.equal(result, made(3, 4) * (2 if step % 3 == 0 else 1))
    assert states[0]["full"]["count"] == 2
    assert not stage.talks
    assert stages.Every(period=1, full=stages.Mean(), otherwise=Doubled()).talks


def test_every_shares_the_states_that_both_chains_name():
    stage = stages.Every(period=2, full=Doubled(), otherwise=Doubled(), shared=("count",))
    params = [made(3, 4)]
    (states,) = init(stage, params, 1)
    assert "count" not in states[0]["full"]
    stage.apply([made(3, 4)], params, states, context(params, step=1))
    assert states[0]["otherwise"]["count"] == 1


def test_a_full_step_of_approach_f_leaves_nothing_of_the_residual():
    distro = stages.Exchange(
        codec=codec.parse("topk(k=1) | float32"), feedback=stages.ResidualMomentum(), over="senders"
    )
    full = stages.Exchange(codec=codec.parse("float32"), feedback=stages.ResidualMomentum(), over="senders")
    stage = stages.Every(
        period=2, full=stages.chain(full), otherwise=stages.chain(distro), shared=("exchange",)
    )
    params = [made(3, 4)]
    states = init(stage, params, 2)
    for step, empty in ((1, False), (2, True), (3, False)):
        run_lockstep(stage, [[made(3, 4, seed=r)] for r in range(2)], params, states, step=step)
        for replica in states:
            residual = replica[0]["otherwise"]["exchange"]["residual"]
            assert (residual.abs().max() == 0) == empty


def test_delayed_results_are_those_of_the_step_before():
    """EF21 returns a state that its next round moves; what waits must not move with it."""
    params = [torch.zeros(4, 3)]

    def through():
        return stages.Exchange(codec=codec.parse("topk(density=0.5) | float32"), feedback=stages.EF21())

    late, prompt = stages.Delayed(through=through()), through()
    late_states, prompt_states = init(late, params, 2), init(prompt, params, 2)
    expected = [torch.zeros(4, 3)]
    for step in range(1, 5):
        updates = [[made(4, 3, seed=10 * step + rank)] for rank in range(2)]
        results, rounds = run_lockstep(late, updates, params, late_states, step=step)
        assert len(rounds) == 1
        for (result,) in results:
            assert torch.equal(result, expected[-1])
        ((result,), _), _ = run_lockstep(prompt, updates, params, prompt_states, step=step)
        expected.append(result.clone())


def test_what_is_predicted_need_not_be_sent():
    """With a lossless exchange the prediction cancels; it is the best multiple of the result's polar factor."""
    stage = stages.Predicted(through=stages.Mean(), direction=stages.Polar(method="svd"))
    params = [made(6, 9)]
    states = init(stage, params, 2)
    for step in range(3):
        updates = [[made(6, 9, seed=10 * step + r)] for r in range(2)]
        results, rounds = run_lockstep(stage, updates, params, states, step=step + 1)
        mean = (updates[0][0] + updates[1][0]) / 2
        # Two subtractions, a sum and an addition, each within eps of numbers no larger than these.
        assert torch.allclose(results[0][0], mean, atol=8 * torch.finfo(torch.float32).eps * 8)
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(states[0][0]["prediction"], states[1][0]["prediction"])
        factor = polar(results[0][0], method="svd")
        prediction = states[0][0]["prediction"]
        left = results[0][0] - prediction
        assert abs(float((left * factor).sum())) < 1e-4
        assert left.norm() < results[0][0].norm()
        if step:
            assert rounds[0][0].tensors[0].norm() != updates[0][0].norm()


@pytest.mark.parametrize(("decay", "swings"), [(0.0, False), (1.0, True)])
def test_a_prediction_and_error_feedback_together_swing_ever_further(decay, swings):
    """Both add up the same difference, hence approach C's default of no error feedback."""
    through = stages.Exchange(
        codec=codec.parse("topk(density=0.05) | sign(scale=tensor)"), feedback=stages.EF14(decay=decay)
    )
    stage = stages.Predicted(through=through, direction=stages.Polar(method="svd"))
    params = [made(16, 16)]
    states = init(stage, params, 1)
    lengths = []
    for step in range(200):
        updates = [[made(16, 16) + 0.3 * made(16, 16, seed=step + 1)]]
        results, _ = run_lockstep(stage, updates, params, states, step=step + 1)
        lengths.append(float(results[0][0].norm()))
    assert (max(lengths) > 20 * lengths[0]) == swings
    assert (max(lengths) < 3 * params[0].norm()) != swings


def test_rows_get_equal_steps_and_the_norm_stays():
    u = made(6, 40) * torch.logspace(-2, 0, 6)[:, None]
    stage = stages.RowNormalize(beta2=0.0)
    (result,) = stage.apply([u], [u], [stage.init(u)], context([u]))
    rows = result.norm(dim=1)
    assert torch.allclose(rows, rows[:1].expand(6), rtol=1e-5)
    assert result.norm() == pytest.approx(u.norm().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(result, u).min() == pytest.approx(1, abs=1e-5)


def test_rows_remember_their_size():
    u = made(6, 40)
    stage = stages.RowNormalize(beta2=0.9)
    state = stage.init(u)
    stage.apply([u], [u], [state], context([u]))
    assert torch.allclose(state["row_squares"], 0.1 * u.square().mean(dim=1, keepdim=True))
    (zero,) = stage.apply([torch.zeros_like(u)], [u], [stage.init(u)], context([u]))
    assert torch.equal(zero, torch.zeros_like(u))


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_weights_go_to_their_polar_factor_of_equal_norm(strength):
    weight = made(5, 8)
    stage = stages.WeightPolar(period=2, strength=strength, polar=stages.Polar(method="svd"))
    zero = [torch.zeros_like(weight)]
    (result,) = stage.apply(zero, [weight], [{}], context(zero, step=1, lr=0.1))
    assert torch.equal(result, zero[0])
    (result,) = stage.apply(zero, [weight], [{}], context(zero, step=2, lr=0.1))
    target = polar(weight, method="svd") * (weight.norm() / 5**0.5)
    assert torch.allclose(weight - 0.1 * result, weight.lerp(target, strength), atol=1e-5)
    (result,) = stage.apply(zero, [weight], [{}], context(zero, step=2, lr=0.0))
    assert torch.equal(result, zero[0])


def test_low_rank_of_enough_rank_is_the_mean_and_leaves_nothing():
    updates = [[low_rank(1, seed=1)], [low_rank(1, seed=5)]]
    stage = stages.PowerSGD(rank=2)
    params = [torch.zeros(12, 20)]
    states = init(stage, params, 2)
    results, rounds = run_lockstep(stage, updates, params, states)
    mean = (updates[0][0] + updates[1][0]) / 2
    for (result,) in results:
        assert torch.allclose(result, mean, atol=1e-4)
    assert [tuple(t.shape) for requests in rounds for t in requests[0].tensors] == [(12, 2), (20, 2)]
    for replica in states:
        assert replica[0]["kept"].abs().max() < 1e-4


def test_low_rank_keeps_what_it_leaves_out_and_warms_up():
    """Sent and kept add up on the mean; fed the same matrices, the factors reach the best rank-2 error."""
    updates = [[made(12, 20, seed=1)], [made(12, 20, seed=2)]]
    mean = (updates[0][0] + updates[1][0]) / 2
    best = torch.linalg.svdvals(mean)[2:].norm()
    stage = stages.PowerSGD(rank=2, decay=0.0)
    params = [torch.zeros(12, 20)]
    states = init(stage, params, 2)
    errors = []
    for step in range(60):
        results, _ = run_lockstep(stage, updates, params, states, step=step + 1)
        assert torch.equal(results[0][0], results[1][0])
        kept = (states[0][0]["kept"] + states[1][0]["kept"]) / 2
        assert torch.allclose(results[0][0] + kept, mean, atol=1e-5)
        errors.append((mean - results[0][0]).norm())
    assert errors[0] > 1.05 * best
    assert errors[-1].item() == pytest.approx(best.item(), rel=1e-3)


def test_dion_steps_by_orthonormal_factors_and_keeps_the_rest():
    updates = [[low_rank(2, seed=1)], [low_rank(2, seed=7)]]
    stage = stages.Dion(rank=4, momentum=0.9)
    params = [torch.zeros(12, 20)]
    states = init(stage, params, 2)
    results, _ = run_lockstep(stage, updates, params, states)
    mean = (updates[0][0] + updates[1][0]) / 2
    # All of the mean is caught, so 1 − μ of it has left the mean momentum.
    kept = (states[0][0]["kept"] + states[1][0]["kept"]) / 2
    assert torch.allclose(kept, 0.9 * mean, atol=1e-4)
    for _ in range(40):
        results, _ = run_lockstep(stage, [[torch.zeros(12, 20)]] * 2, params, states)
    assert torch.linalg.svdvals(results[0][0])[:4].tolist() == pytest.approx([1.0] * 4, abs=0.02)
    assert torch.allclose(results[0][0], polar(mean, method="svd"), atol=0.02)


@pytest.mark.parametrize("kind", [stages.PowerSGD, stages.Dion])
def test_low_rank_of_zero_is_zero(kind):
    params = [torch.zeros(6, 4)]
    stage = kind(fraction=0.5)
    states = init(stage, params, 2)
    for step in range(2):
        results, _ = run_lockstep(stage, [[torch.zeros(6, 4)]] * 2, params, states, step=step + 1)
        assert torch.equal(results[0][0], torch.zeros(6, 4))


def test_low_rank_takes_batches_and_sixteen_bits_on_the_wire():
    params = [torch.zeros(3, 6, 4)]
    stage = stages.PowerSGD(rank=2, wire="bfloat16")
    update = made(3, 6, 4)
    layouts = [stages.MatrixLayout(kind="batch")]
    running = stage.rounds(
        [update],
        params,
        [stage.init(params[0])],
        stages.Context(lr=0.1, step=1, transport=context([]).transport, layouts=layouts),
    )
    request = next(running)
    assert request.tensors[0].dtype == torch.bfloat16
    assert request.tensors[0].shape == (3, 6, 2)
    running.close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: stages.Every(period=0, full=Doubled(), otherwise=Doubled()), "at least 1 step"),
        (lambda: stages.RowNormalize(beta2=1.0), "beta2"),
        (lambda: stages.RowNormalize(eps=0.0), "eps"),
        (lambda: stages.WeightPolar(strength=2.0), "strength"),
        (lambda: stages.PowerSGD(rank=0), "rank of at least 1"),
        (lambda: stages.Dion(fraction=0.0), r"fraction in \(0, 1\]"),
        (lambda: stages.Dion(momentum=1.0), r"\[0, 1\)"),
        (lambda: stages.PowerSGD(wire="int8"), "float32, bfloat16"),
        (lambda: stages.Scale(factor=0.0), "must be positive"),
    ],
)
def test_bad_options_say_what_is_allowed(make, says):
    with pytest.raises(UsageError, match=says):
        make()
