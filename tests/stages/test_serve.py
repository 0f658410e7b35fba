"""What one replica computes for all."""

from dataclasses import dataclass

import pytest
import torch

from muonwire import codec, recipes, stages
from muonwire.codec import payload as payloads
from muonwire.errors import NonFiniteUpdateError, PayloadError, UsageError
from muonwire.optim import ChainOptimizer
from tests.lockstep import lockstep
from tests.models import SmallNet, train, weights

SHAPES = [(4, 6), (8, 3), (5, 5)]


@dataclass(frozen=True)
class Doubled(stages.Stage):
    """Twice the update, and a note of who computed it."""

    def init(self, param):
        return {"times": 0}

    def apply(self, updates, params, states, context):
        for state in states:
            state["times"] += 1
        return [2 * u for u in updates]


def made(shape, *key):
    seed = sum(n * 1009**i for i, n in enumerate(key))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def served(transport, *, wire="bfloat16", owners="one", wrong=False):
    """Weights after two steps, who computed what how often, and the size of each payload."""
    sent, gather = [], transport.gather

    def noted(payload, purpose="update"):
        if purpose == "update":
            sent.append(len(payload))
        return gather(payload, purpose=purpose)

    transport.gather = noted
    params = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    stage = stages.Serve(stage=Doubled(), codec=codec.parse(wire), owners=owners)
    optimizer = ChainOptimizer(params, chain=stages.chain(stages.Mean(), stage), lr=1.0, transport=transport)
    for step in range(2):
        for i, p in enumerate(params):
            p.grad = made(p.shape, step, transport.rank, i)
            if wrong:
                p.grad.fill_(torch.nan)
        optimizer.step()
    return [p.detach() for p in params], [optimizer.state[p]["serve"]["times"] for p in params], sent


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("wire", "owners"), [("float32", "one"), ("float32", "all"), ("bfloat16", "all")])
def test_all_go_on_with_what_the_owner_sent(world_size, wire, owners):
    results = lockstep(lambda transport: served(transport, wire=wire, owners=owners), world_size)
    for i, shape in enumerate(SHAPES):
        expected = torch.zeros(shape)
        for step in range(2):
            doubled = 2 * (sum(made(shape, step, rank, i) for rank in range(world_size)) / world_size)
            expected -= doubled if wire == "float32" else doubled.bfloat16().float()
        owner = i % world_size if owners == "all" else 0
        for rank, (got, times, _) in enumerate(results):
            assert torch.equal(got[i], expected)
            assert times[i] == (2 if rank == owner else 0)
    value_bytes = 4 if wire == "float32" else 2
    for rank, (_, _, sent) in enumerate(results):
        owned = [s for i, s in enumerate(SHAPES) if (i % world_size if owners == "all" else 0) == rank]
        table = [(s, torch.float32, value_bytes * s[0] * s[1]) for s in owned]
        assert sent == [payloads.num_bytes(wire, table)] * 2


def test_what_is_not_finite_is_known_to_all():
    with pytest.raises(NonFiniteUpdateError, match="is not finite"):
        lockstep(lambda transport: served(transport, wrong=True), 2)


def test_an_owner_who_sends_another_shape_is_named():
    def forge(rank, payload):
        return payloads.pack("bfloat16", [((2, 2), torch.float32, bytes(8))] * 3) if rank == 0 else payload

    with pytest.raises(PayloadError, match=r"from replica 0: .* has shape \(2, 2\), \(4, 6\) is expected"):
        lockstep(served, 2, forge)


def test_a_replica_that_sends_what_it_does_not_own_is_named():
    def forge(rank, payload):
        return payloads.pack("bfloat16", [((4, 6), torch.float32, bytes(48))]) if rank == 1 else payload

    with pytest.raises(PayloadError, match=r"from replica 1: .* holds 1 tensors, 0 are expected"):
        lockstep(served, 2, forge)


def test_unknown_owners_say_what_is_allowed():
    with pytest.raises(UsageError, match="allowed are one and all"):
        stages.Serve(stage=Doubled(), codec=codec.parse("bfloat16"), owners="some")


def approach_b(transport, **options):
    model = SmallNet()
    optimizer = recipes.build("approach_b", model, lr=0.01, transport=transport, **options)
    train(model, optimizer, 5, rank=transport.rank, world_size=transport.world_size)
    return weights(model)


def test_a_server_that_sends_every_bit_is_everybody_for_himself():
    everybody, _ = lockstep(approach_b, 2)
    for got in lockstep(lambda transport: approach_b(transport, server=True, wire="float32"), 2):
        assert all(torch.equal(got[n], everybody[n]) for n in everybody)


def test_owners_in_turn_leave_all_replicas_alike():
    first, second, third = lockstep(lambda transport: approach_b(transport, server=True, owners="all"), 3)
    for name, value in first.items():
        assert torch.equal(value, second[name])
        assert torch.equal(value, third[name])
