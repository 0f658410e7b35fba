"""Replicas that take turns: who sends which entry in a round, and the mean over those that did."""

import pytest
import torch

from muonwire import stages
from muonwire.codec import parse
from muonwire.errors import UsageError
from muonwire.transport import run_threads
from tests.stages.test_owners import all_alike, made

SHAPE = (6, 8)


def weights(rank, make, text, *, steps, **more):
    """After each step of rate 1: the update, which is the mean that the exchange made."""
    from muonwire.optim import ChainOptimizer

    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    chain = stages.Exchange(codec=parse(text), over="senders", **more)
    optimizer = ChainOptimizer([weight], chain=chain, lr=1.0, transport=make())
    updates = []
    for step in range(steps):
        before = weight.detach().clone()
        weight.grad = made(SHAPE, step, rank)
        optimizer.step()
        updates.append(before - weight.detach())
    return updates


@pytest.mark.parametrize("parts", [2, 4])
def test_each_entry_is_the_mean_of_those_whose_turn_it_is(parts):
    replicas, steps = 4, 12
    by_rank = run_threads(
        lambda rank, make: weights(rank, make, f"turns(parts={parts}) | float32", steps=steps),
        replicas=replicas,
    )
    assert all_alike(by_rank)
    groups = torch.arange(replicas) % parts
    firsts = set()
    for step, update in enumerate(by_rank[0]):
        sent = torch.stack([made(SHAPE, step, rank) for rank in range(replicas)]).view(replicas, -1)
        # Replica r sends the entries from (s + r) mod F on, for one s of the round.
        matches = []
        for s in range(parts):
            expected = torch.empty(sent.shape[1])
            for part in range(parts):
                expected[(part + s) % parts :: parts] = sent[groups == part][
                    :, (part + s) % parts :: parts
                ].mean(0)
            matches.append(torch.allclose(update.view(-1), expected, atol=1e-6))
        assert matches.count(True) == 1
        firsts.add(matches.index(True))
    assert firsts == set(range(parts)), "the turns go round"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_fewer_replicas_than_parts_leave_nothing_out(replicas):
    """As many parts as replicas: each entry moves in every round, by the update of one of them."""
    by_rank = run_threads(
        lambda rank, make: weights(rank, make, "turns(parts=4) | float32", steps=3), replicas=replicas
    )
    assert all_alike(by_rank)
    for step, update in enumerate(by_rank[0]):
        sent = torch.stack([made(SHAPE, step, rank) for rank in range(replicas)])
        assert float((sent - update).abs().min(0).values.max()) < 1e-6
    stage = stages.Exchange(codec=parse("turns(parts=4) | float32"), over="senders")
    params = [torch.zeros(SHAPE)]
    estimates = [stage.estimate_bytes(params, [], replicas=r) for r in (1, 2, 4, 16)]
    assert estimates[0] > 1.5 * estimates[1] > 2 * estimates[2]
    assert estimates[2] == estimates[3]


def test_owners_means_are_sent_whole():
    with pytest.raises(UsageError, match="or sends a part in turns; give another mean_codec"):
        stages.Exchange(codec=parse("turns(parts=2) | float32"), means="recompressed")


def test_what_is_kept_is_sent_when_its_turn_comes():
    """With feedback nothing is lost: two replicas that send halves of a constant have sent all of it after some rounds."""

    def worker(rank, make):
        from muonwire.optim import ChainOptimizer

        weight = torch.nn.Parameter(torch.zeros(SHAPE))
        chain = stages.Exchange(codec=parse("turns(parts=2) | float32"), feedback=stages.EF14())
        optimizer = ChainOptimizer([weight], chain=chain, lr=1.0, transport=make())
        for _ in range(8):
            weight.grad = torch.ones(SHAPE)
            optimizer.step()
        return -weight.detach(), optimizer.state[weight]["exchange"]["residual"]

    (moved, kept), (_, other) = run_threads(worker, replicas=2)
    torch.testing.assert_close(moved + (kept + other) / 2, torch.full(SHAPE, 8.0))
    assert kept.any()


def test_owners_take_the_parts_of_turns():
    def worker(means, **more):
        text = "turns(parts=2) | float32"
        return lambda rank, make: weights(rank, make, text, steps=2, means=means, **more)

    owned = run_threads(worker("recompressed", mean_codec=parse("float32")), replicas=4)
    assert all_alike(owned)
    for step, update in enumerate(owned[0]):
        sent = torch.stack([made(SHAPE, step, rank) for rank in range(4)])
        halves = torch.stack([sent[::2].mean(0), sent[1::2].mean(0)])
        # Pieces have seeds of their own, so which half sends an entry differs by piece; one of them does.
        off = (halves - update).abs().min(0).values
        assert float(off.max()) < 1e-6
