import pytest
import torch
from torch import nn

from muonwire import recipes, stages
from muonwire.codec import parse
from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer, LocalSteps, local_steps
from muonwire.transport import ProcessGroupTransport, Traffic, check_replicas
from tests.models import SmallNet, train, weights
from tests.replicas import run_replicas

UNCOMPRESSED = {"codec": "float32", "vector_codec": "float32", "feedback": False}


def _averaging(steps):
    transport = ProcessGroupTransport()
    rank, world_size = transport.rank, transport.world_size
    ours, theirs = SmallNet(), SmallNet()
    optimizer = recipes.build("local_muon", ours, lr=0.01, transport=transport, interval=1, **UNCOMPRESSED)
    train(ours, optimizer, steps, rank=rank, world_size=world_size)
    plain = recipes.build("muon", theirs, lr=0.01)
    for step in range(steps):
        train(theirs, plain, 1, start=step, rank=rank, world_size=world_size)
        with torch.no_grad():
            for p, mean in zip(
                theirs.parameters(), transport.mean([p.detach() for p in theirs.parameters()]), strict=True
            ):
                p.copy_(mean)
    return weights(ours), weights(theirs)


def test_one_local_step_without_compression_is_averaging_the_weights():
    """a − mean(a − w) is mean(w) up to two roundings of float32 a step."""
    results = run_replicas(_averaging, 4, 5)
    for ours, theirs in results:
        for name, weight in theirs.items():
            assert torch.allclose(ours[name], weight, rtol=0, atol=5e-6), name
            assert torch.equal(ours[name], results[0][0][name])


def test_one_replica_without_compression_is_muon():
    """a − (a − w) is w up to one rounding a synchronization."""
    ours, theirs = SmallNet(), SmallNet()
    train(ours, recipes.build("local_muon", ours, lr=0.01, interval=3, **UNCOMPRESSED), 12)
    train(theirs, recipes.build("muon", theirs, lr=0.01), 12)
    for name, weight in weights(theirs).items():
        assert torch.allclose(weights(ours)[name], weight, rtol=0, atol=5e-6), name


def _synchronized(steps, interval):
    transport = ProcessGroupTransport()
    model = SmallNet()
    optimizer = recipes.build(
        "local_muon", model, lr=0.01, transport=transport, interval=interval, outer_momentum=0.5
    )
    digests = []
    for step in range(steps):
        train(model, optimizer, 1, start=step, rank=transport.rank, world_size=transport.world_size)
        with optimizer.shared_weights():
            digests.append(check_replicas(model.named_parameters(), transport))
    return digests, optimizer.synchronized, transport.meter.by_purpose.get("update", Traffic()).num_messages


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_shared_weights_are_bit_identical_and_move_every_interval_only(world_size):
    results = run_replicas(_synchronized, world_size, 9, 3)
    digests, synchronized, messages = results[0]
    assert all(r[0] == digests for r in results)
    assert digests[0] == digests[1] != digests[2]
    assert digests[2] == digests[4] != digests[5]
    assert synchronized
    assert messages == 0 if world_size == 1 else 3 < messages <= 3 * 2


def test_shared_weights_come_and_go():
    model = SmallNet()
    optimizer = recipes.build("local_muon", model, lr=0.01, interval=4)
    start = weights(model)
    train(model, optimizer, 2)
    moved = weights(model)
    assert not optimizer.synchronized
    with optimizer.shared_weights():
        assert all(torch.equal(weights(model)[n], start[n]) for n in start)
    assert all(torch.equal(weights(model)[n], moved[n]) for n in moved)


def test_the_outer_step_is_the_stated_formula():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    inner = torch.optim.SGD([weight], lr=0.1)
    chain = stages.chain(
        stages.Exchange(codec=parse("float32")), stages.Momentum(beta=0.5, nesterov=False, form="heavy_ball")
    )
    optimizer = local_steps(inner, outer_chain=chain, local=LocalSteps(interval=2, outer_lr=0.7))
    anchor, momentum = torch.tensor([1.0, 2.0]), torch.zeros(2)
    for _ in range(3):
        for _ in range(2):
            weight.grad = torch.tensor([1.0, -2.0])
            optimizer.step()
        momentum = 0.5 * momentum + 2 * 0.1 * torch.tensor([1.0, -2.0])
        anchor = anchor - 0.7 * momentum
        assert torch.allclose(weight, anchor, atol=1e-6)


def test_schedulers_drive_the_inner_rate():
    model = SmallNet()
    optimizer = recipes.build("local_muon", model, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train(model, optimizer, 1)
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.005}
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.0025}


@pytest.mark.parametrize(
    ("group", "says"),
    [
        ({}, "has outer_chain None; give a Stage, to every group"),
        ({"outer_chain": [stages.Mean()] * 3}, "has 3 outer chains for 2 parameters"),
    ],
)
def test_groups_without_a_way_to_the_others_are_refused(group, says):
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    with pytest.raises(UsageError, match=says):
        ChainOptimizer(
            [{"params": weights, **group}], chain=stages.Sign(), lr=0.1, local=LocalSteps(interval=1)
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0}, "at least 1 local step"),
        ({"interval": 1, "growth": -1.0}, "at least 0 steps a local step"),
        ({"interval": 1, "outer_lr": 0.0}, "must be positive"),
    ],
)
def test_bad_intervals_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        LocalSteps(**options)


def test_a_group_added_later_is_synchronized_too():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    chain = stages.Exchange(codec=parse("float32"))
    optimizer = ChainOptimizer(
        [{"params": [first], "outer_chain": chain}],
        chain=stages.Sign(),
        lr=0.1,
        local=LocalSteps(interval=1),
    )
    with pytest.raises(UsageError, match="outer_chain"):
        optimizer.add_param_group({"params": [second]})
    optimizer.add_param_group({"params": [second], "outer_chain": chain})
    first.grad, second.grad = torch.ones(2), torch.ones(3)
    optimizer.step()
    assert optimizer.synchronized
    assert torch.allclose(second, torch.full((3,), 0.9))


def test_an_interval_that_grows_synchronizes_ever_more_rarely_and_resumes_in_step():
    def synchronizations(optimizer, model, steps, start=0):
        seen = []
        for step in range(start, start + steps):
            train(model, optimizer, 1, start=step)
            if not optimizer.steps_alone:
                seen.append(step + 1)
        return seen

    model = SmallNet()
    optimizer = recipes.build("local_muon", model, lr=0.01, interval=2, growth=0.25)
    # Alone for at least 2 + t / 4 steps: at 3 (2.75), 7 (3.75), 12 (5), 19 (6.75), 28 (9).
    assert synchronizations(optimizer, model, 30) == [3, 7, 12, 19, 28]

    first, resumed = SmallNet(), SmallNet()
    before = recipes.build("local_muon", first, lr=0.01, interval=2, growth=0.25)
    assert synchronizations(before, first, 10) == [3, 7]
    after = recipes.build("local_muon", resumed, lr=0.01, interval=2, growth=0.25)
    after.load_state_dict(before.state_dict())
    resumed.load_state_dict(first.state_dict())
    assert synchronizations(after, resumed, 20, start=10) == [12, 19, 28]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
