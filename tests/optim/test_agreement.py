"""What replicas make sure of: their start, their buffers, their scalers, and dtypes on the wire."""

import warnings

import pytest
import torch
from torch import nn

from muonwire import recipes
from muonwire.errors import DivergedReplicasError, ExchangeError
from muonwire.transport import check_replicas
from tests.lockstep import lockstep
from tests.models import SmallNet, batch, loss, train, weights


class Normed(nn.Module):
    """A hidden matrix behind a batch norm, whose running statistics each replica gathers from its own data."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(6, 8)
            self.norm = nn.BatchNorm1d(8)
            self.hidden = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(torch.relu(self.norm(self.first(x))))))


def train_normed(model, optimizer, steps, rank):
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(7 * step + rank)) + rank
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "distro", "one_bit_muon"])
def test_floating_buffers_are_averaged_at_a_synchronization(name):
    def run(transport):
        model = Normed()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport)
        train_normed(model, optimizer, 4, transport.rank)
        own = model.norm.running_mean.clone()
        with pytest.raises(DivergedReplicasError, match=r"(buffer|parameter) '"):
            check_replicas(model, transport)
        optimizer.synchronize()
        check_replicas(model, transport)
        return own, model.norm.running_mean

    (one, mean), (two, same) = lockstep(run, 2)
    assert not torch.equal(one, two)
    assert torch.equal(mean, same)
    assert torch.allclose(mean, (one + two) / 2)


def test_buffers_can_be_left_out_by_name():
    def run(transport):
        model = Normed()
        optimizer = recipes.build(
            "muon", model, lr=0.01, transport=transport, exclude_buffers=["running_(mean|var)"]
        )
        train_normed(model, optimizer, 2, transport.rank)
        before = model.norm.running_mean.clone()
        optimizer.synchronize()
        with pytest.raises(DivergedReplicasError, match=r"buffer 'norm\.running_mean'"):
            check_replicas(model, transport)
        return torch.equal(before, model.norm.running_mean)

    assert lockstep(run, 2) == [True, True]


@pytest.mark.parametrize("name", ["muon", "one_bit_muon", "psyche"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replicas_can_take_the_first_ones_start(name, dtype):
    def run(transport, start, seed):
        model = SmallNet(seed=seed).to(dtype)
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, start=start)
        losses = train(model, optimizer, 6, rank=transport.rank, world_size=2)
        with optimizer.shared_weights():
            return losses, weights(model), check_replicas(model, transport)

    # The weights are taken when the optimizer is built, before the first gradient.
    given = lockstep(lambda t: run(t, "broadcast", 3 + t.rank), 2)
    alike = lockstep(lambda t: run(t, "check", 3), 2)
    for (losses, one, digest), (expected, two, same) in zip(given, alike, strict=True):
        assert losses == expected
        assert digest == same
        assert all(torch.equal(one[n], two[n]) for n in one)


def test_buffers_belong_to_the_start():
    def run(transport):
        model = Normed()
        model.norm.running_mean += transport.rank
        optimizer = recipes.build("adamw", model, lr=0.01, transport=transport)
        with pytest.raises(DivergedReplicasError, match=r"do not start from .*running_mean"):
            train_normed(model, optimizer, 1, transport.rank)
        return True

    assert lockstep(run, 2) == [True, True]


def test_resuming_at_different_steps_is_an_error():
    def run(transport):
        model = SmallNet()
        optimizer = recipes.build("adamw", model, lr=0.01)
        train(model, optimizer, 2 + transport.rank)
        joined = recipes.build("adamw", model, lr=0.01, transport=transport)
        joined.load_state_dict(optimizer.state_dict())
        with pytest.raises(ExchangeError, match="optimizer groups of replica"):
            train(model, joined, 1)
        return True

    assert lockstep(run, 2) == [True, True]


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_an_overflow_that_one_scaler_found_is_skipped_by_all(name):
    from tests.models import RECIPE_OPTIONS

    options = RECIPE_OPTIONS.get(name, {})

    def run(transport, overflows):
        model = SmallNet()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
        for step in range(7):
            optimizer.zero_grad()
            value = loss(model, batch(step, transport.rank, 2))
            if not overflows and step == 2 and optimizer.local is None:
                continue
            spoiled = overflows and transport.rank == 1 and step == 2
            scaler.scale(value * float("inf") if spoiled else value).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.synchronize()
        with optimizer.shared_weights():
            return check_replicas(model, transport), optimizer.skipped_steps

    found = lockstep(lambda t: run(t, True), 2)
    digests = {digest for digest, _ in found}
    assert len(digests) == 1
    local = recipes.build(name, SmallNet(), lr=0.01, **options).local
    assert [skipped for _, skipped in found] == ([0, 1] if local else [1, 1])
    if not local:
        assert {digest for digest, _ in lockstep(lambda t: run(t, False), 2)} == digests


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_dense_mean_travels_in_the_weights_dtype(dtype):
    def run(transport):
        model = SmallNet().to(dtype)
        optimizer = recipes.build("muon", model, lr=0.01, transport=transport)
        train(model, optimizer, 2, rank=transport.rank, world_size=2)
        numel = sum(p.numel() for p in model.parameters())
        return transport.meter.by_purpose["update"].sent_bytes, numel, optimizer.estimate_bytes(replicas=2)

    for sent, numel, estimate in lockstep(run, 2):
        assert estimate == numel * dtype.itemsize
        # Two steps of two messages, two headers of 16 bytes in each.
        assert sent - 2 * estimate <= 2 * 4 * 16


def test_a_failed_local_step_warns_where_it_happened_and_raises_together():
    def run(transport):
        model = SmallNet()
        optimizer = recipes.build("local_muon", model, lr=0.01, interval=4, transport=transport)
        said, raised = [], []
        for step in range(6):
            optimizer.zero_grad()
            loss(model, batch(step, transport.rank, 2)).backward()
            if transport.rank == 1 and step == 1:
                model.up.weight.grad[0, 0] = float("nan")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    optimizer.step()
                except Exception as error:
                    raised.append((step, type(error).__name__, str(error)))
            said += [str(w.message) for w in caught]
        return said, raised

    (quiet, first), (warned, second) = lockstep(run, 2)
    assert quiet == []
    assert "the gradient of up.weight is not finite" in warned[0]
    assert [r[:2] for r in first] == [r[:2] for r in second] == [(3, "NonFiniteUpdateError")]
    assert "on at least one replica" in first[0][2]
    assert "up.weight is not finite (its norm is nan) in step 2" in second[0][2]
