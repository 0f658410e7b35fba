import copy

import pytest
import torch
from torch import nn

from muonwire import codec, recipes, stages
from muonwire.errors import NonFiniteUpdateError, UsageError
from muonwire.optim import ChainOptimizer
from muonwire.transport import ProcessGroupTransport
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, batch, loss, train, weights
from tests.replicas import run_replicas


def both(make_ours, make_theirs, steps=20, seed=0):
    ours, theirs = SmallNet(seed), SmallNet(seed)
    train(ours, make_ours(ours), steps)
    train(theirs, make_theirs(theirs), steps)
    return weights(ours), weights(theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torch_adamw(weight_decay):
    """The same operations in another order: a few roundings of float32 a step, over 20 steps."""

    def theirs(model):
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)

    ours, expected = both(lambda m: recipes.build("adamw", m, lr=0.01, weight_decay=weight_decay), theirs)
    for name, weight in expected.items():
        assert torch.allclose(ours[name], weight, rtol=1e-5, atol=1e-6), name


class Matrices(nn.Module):
    """Hidden matrices only, so that torch.optim.Muon takes all of it."""

    def __init__(self, hidden):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            # Shapes that differ: matrices of one shape are stacked, and stacked products round differently.
            self.up = nn.Linear(16, hidden, bias=False)
            self.down = nn.Identity() if hidden == 16 else nn.Linear(hidden, 16, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def train_matrices(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()


def muon_and_torch_muon(hidden, nesterov, scale, adjust, steps=20):
    ours, theirs = Matrices(hidden), Matrices(hidden)
    optimizer = recipes.build(
        "muon",
        ours,
        lr=0.02,
        momentum=0.9,
        nesterov=nesterov,
        scale=scale,
        weight_decay=0.05,
        method="newton_schulz",
        schedule="jordan",
        dtype="bfloat16",
    )
    train_matrices(ours, optimizer, steps)
    reference = torch.optim.Muon(
        theirs.parameters(), lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.05, adjust_lr_fn=adjust
    )
    train_matrices(theirs, reference, steps)
    return list(zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_muon_to_the_last_bit_where_the_scale_is_one(nesterov):
    for weight, expected in muon_and_torch_muon(16, nesterov, "spectral", "original"):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize(("scale", "adjust"), [("spectral", "original"), ("rms", "match_rms_adamw")])
def test_muon_is_torch_muon_with_scales(scale, adjust):
    """The scale is multiplied in another order: a last bit of float32, which bfloat16 products turn into one of 2⁻⁸."""
    steps, largest_scale = 20, 0.2 * 40**0.5 if scale == "rms" else (40 / 16) ** 0.5
    for weight, expected in muon_and_torch_muon(40, True, scale, adjust, steps):
        assert (weight - expected).abs().max() <= steps * 0.02 * largest_scale * 2**-8


def test_missing_gradients_are_left_out_as_in_torch():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = ChainOptimizer(
        [used, unused], chain=stages.chain(stages.Mean(), stages.Adam()), lr=0.1, weight_decay=0.5
    )
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))
    assert optimizer.state[unused]["adam"]["step"] == 0
    optimizer.zero_grad()
    before = used.detach().clone()
    optimizer.step()
    assert torch.equal(used, before)


def test_closures_get_gradients_and_their_loss_is_returned():
    model = SmallNet()
    optimizer = recipes.build("muon", model, lr=0.01)

    def closure():
        optimizer.zero_grad()
        value = loss(model, batch(0))
        value.backward()
        return value

    expected = loss(model, batch(0)).item()
    assert optimizer.step(closure).item() == pytest.approx(expected)
    assert loss(model, batch(0)).item() < expected


def test_schedulers_drive_the_rate_of_every_group():
    model = SmallNet()
    optimizer = recipes.build("muon", model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for step in range(4):
        before = weights(model)
        train(model, optimizer, 1, start=step)
        moved = any(not torch.equal(before[n], p) for n, p in model.named_parameters())
        assert moved == (step < 2)
        scheduler.step()


CASES = [(name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES] + VARIANTS


@pytest.mark.parametrize(("recipe", "options"), CASES, ids=[recipes.format_recipe(*case) for case in CASES])
def test_a_state_dict_continues_bit_for_bit(recipe, options):
    whole, halved = SmallNet(), SmallNet()
    expected = train(whole, recipes.build(recipe, whole, lr=0.01, **options), 13)
    first = recipes.build(recipe, halved, lr=0.01, **options)
    losses = train(halved, first, 7)
    state = copy.deepcopy(first.state_dict())
    second = recipes.build(recipe, halved, lr=0.5, **options)
    second.load_state_dict(state)
    losses += train(halved, second, 6, start=7)
    assert losses == expected
    for name, weight in weights(whole).items():
        assert torch.equal(weights(halved)[name], weight)


def test_states_keep_a_wider_dtype_than_their_parameter():
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))

    def make():
        return ChainOptimizer([weight], chain=stages.Momentum(), lr=0.1)

    optimizer = make()
    optimizer.state[weight]["momentum"]["buffer"] = torch.full((2, 2), 1 + 2**-20)
    again = make()
    again.load_state_dict(optimizer.state_dict())
    assert again.state[weight]["momentum"]["buffer"].dtype == torch.float32
    assert torch.equal(again.state[weight]["momentum"]["buffer"], torch.full((2, 2), 1 + 2**-20))


def test_the_state_of_another_chain_is_refused():
    model = SmallNet()
    saved = recipes.build("muon", model, lr=0.01, momentum=0.9).state_dict()
    with pytest.raises(UsageError, match=r"belongs to the chain .*0\.9"):
        recipes.build("muon", model, lr=0.01, momentum=0.8).load_state_dict(saved)


def test_a_group_can_be_added_later_with_a_chain_of_its_own():
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))
    optimizer = ChainOptimizer([first], chain=stages.Sign(), lr=0.1)
    optimizer.add_param_group(
        {"params": [second], "chain": stages.Momentum(nesterov=False, beta=0.0), "lr": 1.0}
    )
    (first.sum() + 2 * second.sum()).backward()
    optimizer.step()
    assert torch.allclose(first, torch.full((2, 2), 0.9))
    assert torch.allclose(second, torch.full((3,), -1.0))


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({"chain": None}, "give a Stage"),
        ({"lr": -1.0}, "must not be negative"),
        ({"layouts": ["matrix", "matrix"]}, "1 parameters, 2 layouts"),
        ({"layouts": ["cube"]}, "does not parse"),
    ],
)
def test_bad_groups_say_what_is_allowed(group, says):
    with pytest.raises(UsageError, match=says):
        ChainOptimizer(
            [{"params": [nn.Parameter(torch.ones(2, 2))], "chain": stages.Sign(), **group}], lr=0.1
        )


def test_a_parameter_in_two_groups_is_refused():
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        ChainOptimizer([{"params": [weight]}, {"params": [weight]}], chain=stages.Sign(), lr=0.1)


def test_printing_shows_the_chain_of_each_group_in_a_line():
    text = str(recipes.build("muon", SmallNet(), lr=0.01))
    hidden = next(line for line in text.splitlines() if line.strip().startswith("hidden"))
    assert "mean → momentum(beta=0.95, nesterov=True, form=ema) → polar(auto) → scale(kind=rms)" in hidden
    assert "2 tensors, 192 parameters" in hidden


def test_copies_go_on_alike():
    model = SmallNet()
    optimizer = recipes.build("muon", model, lr=0.01)
    train(model, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 3, start=3) == train(twin, twin_optimizer, 3, start=3)


def _joined(recipe, steps):
    transport = ProcessGroupTransport()
    model = SmallNet()
    optimizer = recipes.build(recipe, model, lr=0.01, transport=transport)
    train(model, optimizer, steps, rank=transport.rank, world_size=transport.world_size)
    return weights(model), transport.meter.by_purpose["update"]


@pytest.mark.parametrize(("recipe", "tolerance"), [("adamw", 1e-4), ("muon", 2e-2)])
def test_dense_replicas_are_one_process_on_the_joined_batch(recipe, tolerance):
    """The mean of four means is the joined mean up to the order of sums.

    AdamW divides by the root of squares that start near zero, and Muon's bfloat16 products turn a last bit of float32 into one of
    bfloat16 (2⁻⁸) of an update, which has the size lr: both tolerances are relative to lr times the number of steps.
    """
    steps, lr = 6, 0.01
    alone = SmallNet()
    train(alone, recipes.build(recipe, alone, lr=lr), steps, joined=4)
    results = run_replicas(_joined, 4, recipe, steps)
    for together, _ in results:
        for name, weight in weights(alone).items():
            assert torch.equal(together[name], results[0][0][name])
            assert (together[name] - weight).abs().max() <= tolerance * lr * steps * 20, name


@pytest.mark.parametrize("recipe", ["adamw", "muon", "distro"])
def test_a_step_costs_one_exchange_however_many_tensors_and_groups(recipe):
    for _, traffic in run_replicas(_joined, 2, recipe, 5):
        # A mean is a reduction and its spread; a gather one message, and a second where it outgrows the last one.
        assert traffic.num_messages == 2 * 5 if recipe != "distro" else 5 < traffic.num_messages <= 2 * 5


def _uneven_gradients():
    transport = ProcessGroupTransport()
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ChainOptimizer([used, unused], chain=stages.Mean(), lr=1.0, transport=transport)
    (used.sum() if transport.rank else (used + unused).sum()).backward()
    optimizer.step()
    return used.detach(), unused.detach()


def test_a_gradient_that_one_replica_lacks_counts_as_zero():
    for used, unused in run_replicas(_uneven_gradients, 2):
        assert torch.equal(used, torch.zeros(2))
        assert torch.equal(unused, torch.full((2,), 0.5))


def _one_not_finite(kind):
    transport = ProcessGroupTransport()
    weight = nn.Parameter(torch.ones(4))
    stage = stages.Exchange(codec=codec.parse("sign(scale=tensor)"), feedback=stages.EF14())
    optimizer = ChainOptimizer([weight], chain=stage, lr=1.0, transport=transport)
    weight.grad = torch.ones(4)
    if transport.rank == 1:
        weight.grad[2] = float(kind)
    try:
        optimizer.step()
    except NonFiniteUpdateError:
        return weight.detach()
    return None


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_non_finite_update_of_one_replica_stops_all_before_weights_move(kind):
    for weight in run_replicas(_one_not_finite, 3, kind):
        assert torch.equal(weight, torch.ones(4))


def _different_chains():
    transport = ProcessGroupTransport()
    model = SmallNet()
    recipe = "muon" if transport.rank == 0 else "adamw"
    train(model, recipes.build(recipe, model, lr=0.01, transport=transport), 1)


def test_replicas_with_different_recipes_raise_before_they_exchange():
    for error in run_replicas(_different_chains, 2):
        assert error.kind == "ExchangeError"
        assert "optimizer groups of replica(s) 1" in str(error)
