"""An interval that follows the link: agreed between replicas, in the state, and the same bits by its record.

The clock is the test's: a step takes so many seconds, and a synchronization so many of waiting.
"""

import copy
import json

import pytest
import torch

from muonwire import recipes, stages
from muonwire.codec import parse
from muonwire.errors import NonFiniteUpdateError, UsageError
from muonwire.optim import LocalSteps, local_steps
from muonwire.optim.adapting import INTERVALS
from muonwire.transport import SingleReplica, check_replicas, site_transport
from tests.lockstep import lockstep
from tests.models import SmallNet, batch, loss, train
from tests.slow import slow_unless

STEPS = 60
AUTO = {"interval": "auto", "share": 0.2, "intervals": (4, 32)}
STREAMS = [
    {},
    {"fragments": 3},
    {"fragments": 2, "delay": 3, "mix": 0.5},
    {"delay": 1},
    {"fragments": 2, "merge": "arrival"},
]


def built(model, transport=None, **options):
    options = {**AUTO, "outer_momentum": 0.3, **options}
    return recipes.build("local_muon", model, lr=0.02, transport=transport, **options)


def clocked(optimizer, *, step_s=0.5, wait_s=1.0):
    """The optimizer, with a clock that follows from what it has done."""
    optimizer.transport.takes_turns = False

    def measure():
        waited_s = wait_s * optimizer.param_groups[0]["synchronizations"]
        return step_s * optimizer.num_steps + waited_s, waited_s

    if optimizer.local.interval == "auto":
        optimizer.adapting.measure = measure
    return optimizer


def changes(optimizer):
    state = optimizer.param_groups[0][INTERVALS]
    return list(zip(state["steps"], state["intervals"], strict=True))


def go_on(model, optimizer, transport, steps, *, start=0):
    """The digest of the shared weights after every step."""
    digests = []
    for step in range(start, start + steps):
        train(model, optimizer, 1, start=step, rank=transport.rank, world_size=transport.world_size)
        digests.append(check_replicas(optimizer.shared(), transport))
    return digests


def trained(transport, *, step_s=0.5, wait_s=1.0, steps=STEPS, **options):
    model = SmallNet()
    optimizer = clocked(built(model, transport, **options), step_s=step_s, wait_s=wait_s)
    digests = go_on(model, optimizer, transport, steps)
    optimizer.synchronize()
    digests.append(check_replicas(model.named_parameters(), transport))
    return digests, changes(optimizer), optimizer.param_groups[0][INTERVALS]


def test_the_interval_is_what_the_formula_says_of_the_slowest_step_and_the_least_waiting():
    def replica(transport):
        # The second replica is faster, and so waits for longer.
        own = ({"step_s": 0.5, "wait_s": 2.0}, {"step_s": 0.4, "wait_s": 2.6})[transport.rank]
        return trained(transport, **own)

    one, other = lockstep(replica, 2)
    assert one == other
    _, recorded, state = one
    # H* = 2 · 0.8 / (0.2 · 0.5) = 16. It begins at 5, the recipe's own; the first figure is that of the second synchronization.
    assert recorded == [(0, 5), (20, 10), (50, 16)]
    assert state["wait_us"] == [0, 2_000_000, 2_000_000]
    assert state["step_us"] == [0, 500_000, 500_000]
    # 60 steps end within the last interval.
    assert state["window"] == [2_000_000, 500_000]


def test_a_site_tells_the_least_waiting_and_the_slowest_step_of_its_replicas():
    def replica(transport):
        sites = site_transport(transport, sites=2)
        # Seconds of a step and of waiting: the last is the slowest, the first waits least.
        own = [(0.4, 2.0), (0.3, 2.4), (0.3, 2.2), (0.5, 2.3)][transport.rank]
        return trained(sites, step_s=own[0], wait_s=own[1])

    results = lockstep(replica, 4)
    assert all(result == results[0] for result in results[1:])
    assert results[0][1] == [(0, 5), (20, 10), (50, 16)]


def test_where_nothing_is_waited_for_the_interval_falls_to_the_least():
    _, recorded, _ = lockstep(lambda t: trained(t, wait_s=0.0, intervals=(3, 32)), 2)[0]
    assert recorded == [(0, 5), (20, 3)]


@pytest.mark.parametrize("options", slow_unless(lambda index, _: index % 2 == 0, [(o,) for o in STREAMS]))
def test_a_run_by_the_record_has_the_same_bits_whatever_the_link(options):
    recorded_run = lockstep(lambda t: trained(t, **options), 2)
    digests, recorded, state = recorded_run[0]
    assert recorded_run[1] == (digests, recorded, state)
    assert len(recorded) > 1
    other_digests, other, _ = lockstep(lambda t: trained(t, wait_s=0.0, **options), 2)[0]
    assert other != recorded
    assert other_digests != digests

    def again(transport):
        model = SmallNet()
        given = {"outer_momentum": 0.3, "interval": recorded, **options}
        optimizer = recipes.build("local_muon", model, lr=0.02, transport=transport, **given)
        found = go_on(model, optimizer, transport, STEPS)
        optimizer.synchronize()
        return [*found, check_replicas(model.named_parameters(), transport)], changes(optimizer)

    assert lockstep(again, 2) == [(digests, recorded)] * 2


def test_with_fragments_the_distances_change_at_the_beginning_of_an_interval():
    def replica(transport):
        model = SmallNet()
        optimizer = clocked(built(model, transport, fragments=4, delay=2), wait_s=0.5)
        sends = {f: [] for f in range(4)}
        for step in range(1, STEPS + 1):
            before = list(optimizer.param_groups[0]["fragments"]["sent"])
            train(model, optimizer, 1, start=step, rank=transport.rank, world_size=2)
            for f, (a, b) in enumerate(
                zip(before, optimizer.param_groups[0]["fragments"]["sent"], strict=True)
            ):
                if a != b:
                    assert b == step
                    sends[f].append(step)
        return sends, changes(optimizer)

    (sends, recorded), other = lockstep(replica, 2)
    assert (sends, recorded) == other
    assert len(recorded) > 1
    # The stated times: an interval of H that begins after step t sends fragment f in step t + ⌈H (f + 1) / F⌉.
    begins, wanted = 0, {f: [] for f in range(4)}
    while begins < STEPS:
        interval = [h for at, h in recorded if at <= begins][-1]
        for f in range(4):
            at = begins + -(-interval * (f + 1) // 4)
            wanted[f] += [at] * (at <= STEPS)
        begins += interval
    assert sends == wanted


# At a synchronization of all fragments, and between two.
@pytest.mark.parametrize(
    ("at", "options"),
    slow_unless(lambda index, *_: index % 2 == 0, [(at, options) for at in (20, 22) for options in STREAMS]),
)
def test_a_resumed_run_goes_on_with_the_interval_and_its_record_is_the_whole_runs(at, options):
    def replica(transport):
        model = SmallNet()
        optimizer = clocked(built(model, transport, **options), wait_s=2.0)
        digests = go_on(model, optimizer, transport, at)
        held, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        before = changes(optimizer)
        model = SmallNet(seed=3)
        optimizer = clocked(built(model, transport, **options), wait_s=2.0)
        model.load_state_dict(held)
        optimizer.load_state_dict(state)
        assert changes(optimizer) == before
        return [*digests, *go_on(model, optimizer, transport, STEPS - at, start=at)], changes(optimizer)

    digests, recorded = lockstep(replica, 2)[0]
    assert len(recorded) > 1

    def again(transport):
        model = SmallNet()
        given = {"outer_momentum": 0.3, "interval": recorded, **options}
        optimizer = recipes.build("local_muon", model, lr=0.02, transport=transport, **given)
        return go_on(model, optimizer, transport, STEPS), changes(optimizer)

    assert lockstep(again, 2) == [(digests, recorded)] * 2


@pytest.mark.parametrize("options", [{}, {"fragments": 2, "delay": 1}])
def test_around_any_optimizer(options):
    """And what a saved state carries is plain data."""

    def replica(transport, interval):
        def wrapped(model):
            inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            local = LocalSteps(interval=interval, share=0.2, intervals=(4, 16), **options)
            exchange = stages.Exchange(codec=parse("sign(scale=tensor)"), feedback=stages.EF14())
            return local_steps(inner, outer_chain=exchange, local=local, transport=transport, model=model)

        model = SmallNet()
        optimizer = clocked(wrapped(model), wait_s=2.0)
        go_on(model, optimizer, transport, 22)
        state = optimizer.state_dict()
        assert json.loads(json.dumps(state["param_groups"][0][INTERVALS])) == optimizer.adapting.state
        again = wrapped(model)
        again.load_state_dict(state)
        return go_on(model, clocked(again, wait_s=2.0), transport, 30, start=22), changes(again)

    one, other = lockstep(lambda t: replica(t, "auto"), 2)
    assert one == other
    assert [h for _, h in one[1]] == [4, 8, 16]
    assert lockstep(lambda t: replica(t, one[1]), 2)[0] == one


def test_a_copy_has_the_interval():
    optimizer = clocked(built(SmallNet(), fragments=2, delay=1))
    optimizer.adapting._set(intervals=[5, 9], steps=[0, 20], wait_us=[0, 1], step_us=[0, 1])
    copied = copy.deepcopy(optimizer)
    assert copied.adapting.now == 9
    assert copied.adapting._optimizer is copied


@pytest.mark.parametrize("options", [{}, {"fragments": 2, "delay": 1}])
def test_states_of_fixed_intervals_load_and_the_other_way_round(options):
    fixed = recipes.build("local_muon", SmallNet(), lr=0.02, outer_momentum=0.3, interval=7, **options)
    adapting = built(SmallNet(), **options)
    adapting.load_state_dict(fixed.state_dict())
    assert changes(adapting) == [(0, 5)]
    adapting.adapting._set(intervals=[5, 9], steps=[0, 20], wait_us=[0, 1], step_us=[0, 1])
    fixed.load_state_dict(adapting.state_dict())
    assert INTERVALS not in fixed.param_groups[0]
    assert "gaps" not in fixed.param_groups[0].get("fragments", {})


@pytest.mark.parametrize("options", [{}, {"fragments": 2, "delay": 1}])
def test_a_synchronization_that_fails_changes_no_interval(options):
    """A NaN at the synchronization that would have changed it; afterwards the replicas still agree."""

    def replica(transport):
        model = SmallNet()
        optimizer = clocked(built(model, transport, **options), wait_s=2.0)
        go_on(model, optimizer, transport, 17)
        before = changes(optimizer)
        raised = 0
        for step in range(17, STEPS):
            optimizer.zero_grad()
            loss(model, batch(step, transport.rank, 2)).backward()
            if step in (17, 18, 19) and transport.rank == 1:
                next(model.parameters()).grad.fill_(float("nan"))
            try:
                optimizer.step()
            except NonFiniteUpdateError:
                raised += 1
                assert changes(optimizer) == before
        return raised, changes(optimizer), check_replicas(optimizer.shared(), transport)

    with pytest.warns(UserWarning, match="leaves step"):
        one, other = lockstep(replica, 2)
    assert one == other
    assert one[0] >= 1
    assert len(one[1]) > 1


def test_without_a_link_it_stays_at_the_default_and_says_so():
    def replica(transport):
        model = SmallNet()
        optimizer = built(model, transport)
        train(model, optimizer, 30, rank=transport.rank, world_size=2)
        return changes(optimizer), repr(optimizer)

    for recorded, text in lockstep(replica, 2):
        assert recorded == [(0, 5)]
        assert "H stays 5, since replicas that take turns in one process do not wait for a link" in text
    model = SmallNet()
    alone = built(model, SingleReplica())
    train(model, alone, 30)
    assert changes(alone) == [(0, 5)]
    assert "H stays 5, since one replica has nobody to wait for" in repr(alone)
    # With the link's own times, that of threads would be any number.
    assert lockstep(lambda t: trained(t, steps=21)[1], 2)[0] != [(0, 5)]


def test_the_text_says_how_the_interval_is_found():
    text = str(LocalSteps(interval="auto", share=0.02, intervals=(4, 64)))
    assert "every 4 at first, then so often that waiting stays below 2 % of the time (H from 4 to 64)" in text
    one, other = (str(LocalSteps(interval=[(0, 4), (8, h)])) for h in (6, 7))
    assert "every 4 at first, then by a record of 1 change (" in one
    # Replicas compare these texts before they begin.
    assert one != other


def test_bytes_are_estimated_for_the_present_interval():
    options = {"outer_momentum": 0.3}
    five = recipes.build("local_muon", SmallNet(), lr=0.02, interval=5, **options).estimate_bytes(replicas=4)
    optimizer = built(SmallNet())
    assert optimizer.estimate_bytes(replicas=4) == five
    optimizer.adapting._set(intervals=[5, 10], steps=[0, 20], wait_us=[0, 1], step_us=[0, 1])
    assert optimizer.estimate_bytes(replicas=4) == five / 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": "auto", "growth": 0.1}, "growth is 0.1 with interval='auto', which says H by itself"),
        ({"interval": [(0, 4)], "growth": 0.1}, "growth is 0.1 with interval="),
        ({"interval": "auto", "share": 0.0}, "share is 0.0; it lies between 0 and 1"),
        (
            {"interval": "auto", "intervals": (8, 4)},
            r"intervals is \(8, 4\); wanted are the least and the largest",
        ),
        ({"interval": "auto", "intervals": (4,)}, r"wanted are the least and the largest"),
        ({"interval": "auto", "intervals": (0, 4)}, r"wanted are the least and the largest"),
        ({"interval": "auto", "first_interval": 3}, r"first_interval is 3; with intervals=\(4, 128\)"),
        ({"interval": "auto", "fragments": 5}, r"fragments is 5; with an interval \(H\) of 4"),
        ({"interval": [(0, 9), (9, 3)], "delay": 3}, r"delay is 3; with an interval \(H\) of 3"),
        ({"interval": "often"}, "interval is 'often', which is no record of intervals"),
        ({"interval": [(1, 3)]}, "the first of step 0"),
    ],
)
def test_bad_settings_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        LocalSteps(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0.5}, "interval is 0.5; a whole number or a text or a list of pairs"),
        (
            {"interval": 4, "share": 0.1},
            'share is given but does nothing here; it acts only with interval="auto"',
        ),
        ({"intervals": (4, 8)}, "intervals is given but does nothing here"),
        ({"interval": "auto", "intervals": (4, 8, 9)}, "wanted are the least and the largest"),
        ({"interval": "auto", "intervals": "4 8"}, "a list of whole numbers is wanted"),
    ],
)
def test_recipes_refuse_what_does_nothing_or_is_of_another_kind(options, says):
    with pytest.raises(UsageError, match=says):
        recipes.build("local_muon", SmallNet(), lr=0.02, **options)


def test_a_recipe_begins_at_its_own_interval_within_the_bounds():
    for name, bounds, first in (
        ("one_bit_muon", (4, 128), 11),
        ("muloco", (4, 128), 30),
        ("muloco", (4, 16), 16),
        ("local_muon", (8, 16), 8),
    ):
        optimizer = recipes.build(name, SmallNet(), lr=0.02, interval="auto", intervals=bounds)
        assert optimizer.adapting.now == first
