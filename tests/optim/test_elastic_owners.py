"""Means by owners between replicas that come and go: parts move, and what an owner kept of them begins anew."""

import itertools
import threading
import time

import pytest

from muonwire.stages.pieces import cut
from tests.optim.test_elastic import (
    GoneError,
    Replica,
    agree,
    end,
    fixed_digest,
    lighthouse,  # noqa: F401 - a fixture
    together,
)
from tests.slow import slow_unless

SHARED = "sign(scale=shared)"
LOSSLESS = f'one_bit_muon(interval=3, means="lossless", codec="{SHARED}", vector_codec="{SHARED}")'
RECOMPRESSED = 'one_bit_muon(interval=3, means="recompressed")'
EVERY_STEP = 'ef14_muon(codec="sign(scale=tensor)", means="recompressed")'
AUTO = 'one_bit_muon(interval=3, means="auto")'


def owned(replica):
    """The pieces of the outer tensors of which this replica keeps an owner's residual: tensor, begin, number of entries."""
    params = [p for _, p in replica.optimizer.named_parameters()]
    owners = [replica.optimizer.state[p]["outer"]["exchange"]["owner"] for p in params]
    return [(i, o["begin"], o["residual"].numel()) for i, o in enumerate(owners) if o]


def the_others_lose_no_step(replicas):
    """Of a, b and c, which were to take nine steps, b is gone; the others have taken all of them, and end alike."""
    end(*replicas)
    first, gone, last = replicas
    assert isinstance(gone.error, GoneError)
    assert [first.error, last.error] == [None, None]
    agree(*replicas)
    assert [line["step"] for line in first.log] == list(range(10))
    assert first.log[-1] == last.log[-1]
    assert last.log[-1]["members"] == ("a", "c")


@pytest.mark.parametrize("recipe", [LOSSLESS, RECOMPRESSED, EVERY_STEP])
def test_without_faults_the_outcome_is_that_of_fixed_replicas(recipe, lighthouse):  # noqa: F811
    replicas = together(Replica(n, lighthouse, recipe, steps=9, min_replicas=3) for n in ("a", "b", "c"))
    end(*replicas)
    assert [r.error for r in replicas] == [None] * 3

    wanted = fixed_digest(recipe, steps=9)
    assert {r.log[-1]["digest"] for r in replicas} == {wanted}
    assert {n for r in replicas for n in r.counted} == {3}


@pytest.mark.parametrize(
    "recipe",
    slow_unless(lambda index, recipe: recipe == RECOMPRESSED, [(LOSSLESS,), (RECOMPRESSED,), (AUTO,)]),
)
def test_one_joins_and_another_leaves(recipe, lighthouse):  # noqa: F811
    enough, seen = threading.Event(), {}

    def act(replica, step):
        if step == 7:
            enough.set()
        if step > 7:
            time.sleep(0.1)
        if recipe == RECOMPRESSED:
            seen.setdefault((replica.name, replica.transport.members, step), owned(replica))
        if replica.name == "b" and step > 12 and "c" in replica.transport.members:
            raise GoneError

    first = together(Replica(n, lighthouse, recipe, steps=40, before=act) for n in ("a", "b"))
    third = Replica("c", lighthouse, recipe, steps=40, seed=5, begin_at=enough, before=act).start()
    end(*first, third)
    assert isinstance(first[1].error, GoneError)
    assert [first[0].error, third.error] == [None, None]
    agree(*first, third)
    # It owned a part in its first synchronization, and brought nothing.
    assert third.counted[0] == 2
    assert third.log[-1]["members"] == ("a", "c")
    assert third.log[-1]["digest"] == first[0].log[-1]["digest"]
    assert {len(line["members"]) for line in first[0].log} >= {2, 3}
    if recipe == RECOMPRESSED:
        shapes = tuple(tuple(p.shape) for _, p in third.optimizer.named_parameters())
        for replica in (first[0], third):
            cuts = cut(shapes, 2, "entry")[replica.transport.rank]
            assert owned(replica) == [(p.tensor, p.begin, p.end - p.begin) for p in cuts]
        # What each kept was of the parts that it had among those who were there.
        assert len({tuple(pieces) for (name, _, _), pieces in seen.items() if name == "a" and pieces}) > 1


@pytest.mark.parametrize(
    ("recipe", "operation"),
    slow_unless(
        lambda index, recipe, operation: index % 2 == 0,
        [(recipe, operation) for recipe in (LOSSLESS, RECOMPRESSED) for operation in range(1, 8)],
    ),
)
def test_one_that_dies_in_the_middle_of_an_exchange_costs_the_others_no_step(recipe, operation, lighthouse):  # noqa: F811
    """Whatever message of whatever round it dies in."""

    def arm(replica, step):
        if replica.name == "b" and step == 6:
            carry, calls = replica.transport.carry, itertools.count(1)

            def dies(*args):
                if next(calls) == operation:
                    replica.transport._connections.abort()
                    raise GoneError
                return carry(*args)

            replica.transport.carry = dies

    replicas = together(Replica(n, lighthouse, recipe, steps=9, before=arm) for n in ("a", "b", "c"))
    the_others_lose_no_step(replicas)


@pytest.mark.parametrize("recipe", [RECOMPRESSED, EVERY_STEP])
def test_one_that_dies_between_two_rounds_is_not_taken_for_one_that_has_moved(recipe, lighthouse):  # noqa: F811
    """The others have all messages of the first round, and none of the second: they repeat the whole exchange."""

    def arm(replica, step):
        if replica.name == "b" and step == 6:

            def dies():
                # The others wait in the message behind the first round.
                time.sleep(0.2)
                replica.transport._connections.abort()
                raise GoneError

            replica.transport.settle = dies

    replicas = together(Replica(n, lighthouse, recipe, steps=9, before=arm) for n in ("a", "b", "c"))
    the_others_lose_no_step(replicas)
