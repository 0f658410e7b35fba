import pytest
import torch

from muonwire import codec, recipes, stages
from muonwire.errors import UsageError
from muonwire.optim import ChainOptimizer
from tests.lockstep import lockstep
from tests.models import SmallNet, batch, loss, weights

LR, STEPS = 0.01, 6


def looked_ahead(transport, **options):
    """What the parameters hold and what is shared after each step, with a rate that changes."""
    model = SmallNet()
    optimizer = recipes.build("psyche", model, lr=LR, transport=transport, **options)
    history = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR / (1 + step)
        optimizer.zero_grad()
        loss(model, batch(step, transport.rank, transport.world_size)).backward()
        optimizer.step()
        held = weights(model)
        with optimizer.shared_weights():
            shared = weights(model)
        assert all(torch.equal(held[n], w) for n, w in weights(model).items())
        history.append((held, shared))
    return history


def by_hand(transport):
    """Shared weights after each step of DisTrO, whose gradients are taken where its residual's sign leads."""
    model = SmallNet()
    optimizer = recipes.build("distro", model, lr=LR, transport=transport)
    history = []
    for step in range(STEPS):
        before = {p: p.detach().clone() for p in model.parameters()}
        with torch.no_grad():
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.sub_(optimizer.state[p]["exchange"]["residual"].sign(), alpha=group["lr"])
        optimizer.param_groups[0]["lr"] = LR / (1 + step)
        optimizer.zero_grad()
        loss(model, batch(step, transport.rank, transport.world_size)).backward()
        with torch.no_grad():
            for p, value in before.items():
                p.copy_(value)
        optimizer.step()
        history.append(weights(model))
    return history


def test_gradients_are_taken_where_the_residual_would_lead():
    results = lockstep(looked_ahead, 2)
    expected, _ = lockstep(by_hand, 2)
    for step, want in enumerate(expected):
        (held, shared), (other_held, other_shared) = (history[step] for history in results)
        for name, value in want.items():
            assert torch.equal(shared[name], value)
            assert torch.equal(other_shared[name], value)
        assert any(not torch.equal(held[n], other_held[n]) for n in want)


def test_delayed_results_move_the_weights_a_step_later():
    first, second = lockstep(lambda transport: looked_ahead(transport, delayed=True), 2)
    start = weights(SmallNet())
    for name, value in first[0][1].items():
        # Only the weight decay of matrices moves anything in the first step.
        decayed = start[name] * (1 - LR * 0.01) if start[name].ndim >= 2 else start[name]
        assert torch.equal(value, decayed)
    assert not torch.equal(first[1][1]["up.weight"], first[0][1]["up.weight"])
    for (_, shared), (_, other) in zip(first, second, strict=True):
        assert all(torch.equal(shared[n], other[n]) for n in shared)


def test_closures_are_evaluated_where_the_gradient_is_taken():
    """One closure a step gives the losses and weights of gradients taken before the step."""
    runs = []
    for with_closure in (False, True):
        model = SmallNet()
        optimizer = recipes.build("psyche", model, lr=LR)
        losses = []
        for step in range(4):

            def closure(step=step, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                value = loss(model, batch(step))
                value.backward()
                return value

            if with_closure:
                losses.append(optimizer.step(closure).item())
            else:
                losses.append(closure().item())
                optimizer.step()
        runs.append((losses, weights(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][n], runs[1][1][n]) for n in runs[0][1])


def test_a_group_can_be_added_later():
    first, second = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    exchange = stages.Exchange(codec=codec.parse("float32"), feedback=stages.ResidualMomentum())
    optimizer = ChainOptimizer([first], chain=exchange, lr=0.1, look_ahead=("exchange", "residual"))
    optimizer.add_param_group({"params": [second]})
    (first.sum() + second.sum()).backward()
    optimizer.step()
    with optimizer.shared_weights():
        assert torch.equal(first, second)
        assert not torch.equal(second, torch.ones(2, 2))


def test_a_chain_without_that_residual_is_refused():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(
        UsageError, match=r"has no exchange\.residual; look_ahead wants the path of the residual"
    ):
        ChainOptimizer(
            [weight], chain=stages.chain(stages.Sign()), lr=0.1, look_ahead=("exchange", "residual")
        )
