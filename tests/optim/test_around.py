"""Local steps around torch's own optimizers, and a user's."""

import copy

import pytest
import torch
from torch import nn

from muonwire import recipes, stages
from muonwire.codec import parse
from muonwire.errors import NonFiniteUpdateError, UsageError
from muonwire.optim import ChainOptimizer, LocalSteps, local_steps
from muonwire.transport import check_replicas
from tests.lockstep import lockstep
from tests.models import SmallNet, batch, loss, train, weights

OUTER = stages.chain(
    stages.Exchange(codec=parse("sign(scale=tensor)"), feedback=stages.EF14(decay=0.5)),
    stages.Momentum(beta=0.3, form="heavy_ball"),
)


def around(inner, model, transport=None, interval=3, **more):
    return local_steps(
        inner,
        outer_chain=OUTER,
        local=LocalSteps(interval=interval, outer_lr=0.9),
        transport=transport,
        model=model,
        **more,
    )


def adamw(model):
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)


class Square(nn.Module):
    """Hidden square matrices only, which torch.optim.Muon takes whole and scales by 1."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return torch.tanh(self.up(x))


def train_square(model, optimizer, steps, rank):
    for step in range(steps):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        (model(x) - x.roll(1, 0)).square().mean().backward()
        optimizer.step()


def test_around_torchs_muon_is_local_muon_to_the_last_bit():
    def both(transport):
        theirs, ours = Square(), Square()
        wrapped = around(
            torch.optim.Muon(theirs.parameters(), lr=0.02, momentum=0.9, weight_decay=0.05), theirs, transport
        )
        train_square(theirs, wrapped, 10, transport.rank)
        built = recipes.build(
            "local_muon",
            ours,
            lr=0.02,
            momentum=0.9,
            weight_decay=0.05,
            scale="spectral",
            method="newton_schulz",
            schedule="jordan",
            dtype="bfloat16",
            interval=3,
            codec="sign(scale=tensor)",
            feedback_decay=0.5,
            outer_momentum=0.3,
            outer_lr=0.9,
            transport=transport,
        )
        train_square(ours, built, 10, transport.rank)
        return theirs.up.weight.detach(), ours.up.weight.detach()

    for theirs, ours in lockstep(both, 2):
        assert torch.equal(theirs, ours)


def test_around_torchs_adamw_is_local_adamw():
    """The same operations in another order: a few roundings of float32 a step, and where they turn a sign on the wire, its size."""

    def both(transport):
        theirs, ours = SmallNet(), SmallNet()
        one = parse("float32")
        wrapped = local_steps(
            adamw(theirs),
            outer_chain=stages.Exchange(codec=one),
            local=LocalSteps(interval=3),
            transport=transport,
            model=theirs,
        )
        train(theirs, wrapped, 9, rank=transport.rank, world_size=2)
        built = recipes.build(
            "local_adamw",
            ours,
            lr=0.01,
            interval=3,
            codec="float32",
            vector_codec="float32",
            feedback=False,
            transport=transport,
        )
        train(ours, built, 9, rank=transport.rank, world_size=2)
        return weights(theirs), weights(ours)

    for theirs, ours in lockstep(both, 2):
        for name, weight in theirs.items():
            assert torch.allclose(weight, ours[name], rtol=1e-5, atol=2e-6), name


INNER = {
    "adamw": adamw,
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.01),
    "named": lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.01),
}


@pytest.mark.parametrize("kind", list(INNER))
def test_a_wrapped_optimizer_resumes_copies_and_follows_schedules(kind):
    def run(transport):
        model = SmallNet()
        optimizer = around(INNER[kind](model), model, transport)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        for step in range(4):
            train(model, optimizer, 1, start=step, rank=transport.rank, world_size=2)
            scheduler.step()
        saved = copy.deepcopy(optimizer.state_dict())
        rates = [g["lr"] for g in optimizer.param_groups]
        assert rates == [g["lr"] for g in optimizer.around.param_groups]
        assert "around" in optimizer.state[model.up.weight]
        again = copy.deepcopy(model)
        resumed = around(INNER[kind](again), again, transport)
        resumed.load_state_dict(saved)
        ends = []
        for m, o in ((model, optimizer), (again, resumed)):
            ends.append((train(m, o, 5, start=4, rank=transport.rank, world_size=2), weights(m)))
            assert [g["lr"] for g in o.param_groups] == rates
        with optimizer.shared_weights():
            digest = check_replicas(model, transport)
        return ends, digest

    (first, digest), (second, other) = lockstep(run, 2)
    assert digest == other
    for (losses, one), (resumed, two) in (first, second):
        assert losses == resumed
        assert all(torch.equal(one[n], two[n]) for n in one)


def test_the_wrapped_state_is_whose_it_is():
    model = SmallNet()
    optimizer = around(adamw(model), model)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UsageError, match="belongs to the chain 'AdamW'"):
        around(torch.optim.RAdam(adamw(SmallNet()).param_groups), None).load_state_dict(saved)
    with pytest.raises(UsageError, match="belongs to the chain"):
        recipes.build("adamw", SmallNet(), lr=0.01).load_state_dict(saved)
    with pytest.raises(UsageError, match="is a ChainOptimizer; give its groups an outer_chain"):
        around(optimizer, model)


def test_a_gradient_that_is_not_finite_reaches_no_wrapped_optimizer():
    model = SmallNet()
    optimizer = around(adamw(model), model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    loss(model, batch(2)).backward()
    model.up.weight.grad[0, 0] = float("nan")
    with pytest.raises(NonFiniteUpdateError):
        optimizer.step()
    assert str(optimizer.state_dict()) == str(before)


def test_own_chains_take_local_steps_by_themselves():
    model = SmallNet()
    optimizer = ChainOptimizer(
        [{"params": list(model.parameters()), "outer_chain": OUTER}],
        chain=stages.chain(stages.Adam()),
        lr=0.01,
        local=LocalSteps(interval=2),
    )
    train(model, optimizer, 4)
    assert optimizer.synchronized
