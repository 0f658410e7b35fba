"""Fragments that synchronize at different times, and travel while the replica goes on."""

import copy
import itertools
import os
import threading

import pytest
import torch
from torch import nn

from muonwire import recipes, stages
from muonwire.codec import parse
from muonwire.errors import NonFiniteUpdateError, PayloadError, ReplicaLostError, UsageError
from muonwire.optim import LocalSteps, local_steps
from muonwire.optim.fragments import cut, first_counts
from muonwire.transport import ProcessGroupTransport, Transport, check_replicas
from tests.lockstep import lockstep
from tests.models import SmallNet, batch, loss, train, weights
from tests.replicas import run_replicas

INTERVAL, STEPS = 4, 11
GRID = [
    {"fragments": fragments, "delay": delay, **({"mix": mix} if delay else {})}
    for fragments in (1, 2, 4)
    for delay, mix in ((0, 1.0), (1, 0.5), (1, 1.0), (3, 0.5), (3, 1.0))
]


def built(model, transport=None, **options):
    options = {"interval": INTERVAL, "outer_momentum": 0.3, **options}
    return recipes.build("one_bit_muon", model, lr=0.02, transport=transport, **options)


def shared_digest(optimizer, transport):
    return check_replicas(optimizer.shared(), transport)


def trained(transport, **options):
    """The digest of the shared weights after every step, and after the flush."""
    model = SmallNet()
    optimizer = built(model, transport, **options)
    digests = []
    for step in range(STEPS):
        train(model, optimizer, 1, start=step, rank=transport.rank, world_size=transport.world_size)
        digests.append(shared_digest(optimizer, transport))
    optimizer.synchronize()
    assert optimizer.synchronized
    assert optimizer.steps_alone == 0
    return [*digests, check_replicas(model.named_parameters(), transport)]


def _grid():
    return [trained(ProcessGroupTransport(), **options) for options in GRID]


def test_processes_and_threads_come_to_the_same_bits_on_all_replicas():
    results = run_replicas(_grid, 2)
    assert results[0] == results[1]
    for digests, options in zip(results[0], GRID, strict=True):
        assert lockstep(lambda transport, options=options: trained(transport, **options), 2) == [digests] * 2
        # Nothing moves before the first fragment's result is merged, and every fragment moves the weights by itself.
        fragments, delay = options["fragments"], options["delay"]
        first = INTERVAL // fragments + delay
        assert len(set(digests[: first - 1])) <= 1
        assert len(set(digests[first - 1 :])) > fragments
    assert len({digests[-1] for digests in results[0]}) == len(GRID)


def test_one_fragment_without_delay_is_what_local_steps_are_without_fragments(monkeypatch):
    plain = lockstep(trained, 2)
    monkeypatch.setattr(LocalSteps, "streams", True)
    assert lockstep(trained, 2) == plain


@pytest.mark.parametrize("mix", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("fragments", "delay"), [(1, 2), (2, 0), (2, 1), (2, 3)])
def test_sending_and_merging_are_the_stated_formulas(fragments, delay, mix):
    """Two weights with constant gradients, whose outer chain is a momentum, by hand."""
    starts, gradients, lr, outer_lr, beta, interval = (1.0, 2.0), (1.0, -2.0), 0.1, 0.7, 0.5, 4
    params = [nn.Parameter(torch.full((3,), start, dtype=torch.float64)) for start in starts]
    chain = stages.chain(
        stages.Exchange(codec=parse("float32")), stages.Momentum(beta=beta, nesterov=False, form="heavy_ball")
    )
    optimizer = local_steps(
        torch.optim.SGD(params, lr=lr),
        outer_chain=chain,
        local=LocalSteps(interval=interval, outer_lr=outer_lr, fragments=fragments, delay=delay, mix=mix),
    )
    own, shared, momentum = list(starts), list(starts), [0.0, 0.0]
    sent, arriving = [0.0, 0.0], [0, 0]
    # With two fragments the first weight is sent in steps 2, 6, ...; the second, or both, in 4, 8, ...
    sends_at = [interval // 2 if fragments == 2 else interval, interval]
    for step in range(1, 15):
        for p, g in zip(params, gradients, strict=True):
            p.grad = torch.full_like(p, g)
        optimizer.step()
        for i, g in enumerate(gradients):
            own[i] -= lr * g
            if step >= sends_at[i] and (step - sends_at[i]) % interval == 0:
                sent[i], arriving[i] = own[i], step + delay
            if step == arriving[i]:
                momentum[i] = beta * momentum[i] + shared[i] - sent[i]
                shared[i] -= outer_lr * momentum[i]
                own[i] = shared[i] + mix * (own[i] - sent[i])
        for p, wanted in zip(params, own, strict=True):
            # The change travels in float32.
            assert torch.allclose(p, torch.full_like(p, wanted), atol=1e-6)
        assert [float(at[0]) for _, at in optimizer.shared()] == pytest.approx(shared, abs=1e-6)


def test_fragments_are_sent_at_staggered_times_and_are_about_equal():
    assert first_counts(LocalSteps(interval=11, fragments=4), step=20)["sent"] == [12, 15, 18, 20]
    assert cut([5] * 8, 4) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert cut([1, 1, 1, 100], 4) == [0, 1, 2, 3]
    assert cut([100, 1, 1, 1], 2) == [0, 1, 1, 1]
    model = SmallNet()
    optimizer = built(model, fragments=3, delay=1)
    counts = []
    for step in range(9):
        before = list(optimizer.param_groups[0]["fragments"]["sent"])
        train(model, optimizer, 1, start=step)
        after = optimizer.param_groups[0]["fragments"]["sent"]
        counts.append([i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b])
    assert counts == [[], [0], [1], [2], [], [0], [1], [2], []]
    # In the model's order, whatever the groups' order is.
    indices = [optimizer.state[p]["fragment"]["index"] for p in model.parameters()]
    assert indices == sorted(indices)
    assert set(indices) == {0, 1, 2}


LOSSLESS = {"means": "lossless", "codec": "sign(scale=shared)", "vector_codec": "sign(scale=shared)"}


@pytest.mark.parametrize(
    "options",
    [
        {"fragments": 2, "delay": 3},
        {"delay": 2, "mix": 0.5},
        {"fragments": 4, "delay": 1},
        {"fragments": 2, "delay": 1, **LOSSLESS},
    ],
)
def test_a_run_that_is_resumed_at_any_step_goes_on_as_the_undisturbed_one(options):
    """Whatever is in flight; the state is plain data."""

    def replica(transport):
        rank = transport.rank
        undisturbed, model = SmallNet(), SmallNet()
        first, optimizer = built(undisturbed, transport, **options), built(model, transport, **options)
        in_flight = []
        for step in range(STEPS):
            train(undisturbed, first, 1, start=step, rank=rank, world_size=2)
            train(model, optimizer, 1, start=step, rank=rank, world_size=2)
            held, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            in_flight.append(sum(s["fragment"]["arrived"].numel() > 0 for s in state["state"].values()))
            model = SmallNet(seed=3)
            optimizer = built(model, transport, **options)
            model.load_state_dict(held)
            optimizer.load_state_dict(state)
        for o in (first, optimizer):
            o.synchronize()
        assert all(
            torch.equal(p, q) for p, q in zip(undisturbed.parameters(), model.parameters(), strict=True)
        )
        return in_flight, check_replicas(model.named_parameters(), transport)

    (in_flight, digest), other = lockstep(replica, 2)
    assert (in_flight, digest) == other
    assert max(in_flight) > 0


def test_lossless_means_of_fragments_are_those_of_a_gather():
    gathered = LOSSLESS | {"means": "gather"}
    results = [
        lockstep(lambda transport, form=form: trained(transport, fragments=2, delay=1, **form), 3)
        for form in (LOSSLESS, gathered)
    ]
    assert results[0] == results[1]


def test_states_of_other_fragments_are_refused():
    saved = built(SmallNet(), fragments=2, delay=1).state_dict()
    with pytest.raises(UsageError, match=r"has 2 fragment\(s\), this optimizer 4"):
        built(SmallNet(), fragments=4).load_state_dict(saved)
    with pytest.raises(UsageError, match=r"has 2 fragment\(s\), this optimizer 1"):
        built(SmallNet()).load_state_dict(saved)


def test_synchronize_in_the_middle_merges_what_is_in_flight_and_begins_a_new_interval():
    def replica(transport):
        model = SmallNet()
        optimizer = built(model, transport, fragments=2, delay=3)
        train(model, optimizer, 6, rank=transport.rank, world_size=2)
        counts = optimizer.param_groups[0]["fragments"]
        assert counts["merge"] == [9, 7]
        optimizer.synchronize()
        assert optimizer.synchronized
        counts = optimizer.param_groups[0]["fragments"]
        assert counts == {"sent": [4, 6], "synchronized": [6, 6], "merge": [0, 0], "rounds": [2, 2]}
        again = check_replicas(optimizer.shared(), transport)
        # Nothing is left to do.
        optimizer.synchronize()
        assert check_replicas(optimizer.shared(), transport) == again
        train(model, optimizer, 2, start=6, rank=transport.rank, world_size=2)
        assert optimizer.param_groups[0]["fragments"]["merge"] == [11, 0]
        return again

    assert len(set(lockstep(replica, 2))) == 1


def _poisoned(transport, nonfinite):
    """A NaN on replica 1 in step 3; which steps raise, and what became of the shared weights in them."""
    model = SmallNet()
    optimizer = built(model, transport, fragments=2, delay=1, nonfinite=nonfinite)
    raised = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, batch(step, transport.rank, 2)).backward()
        if step == 2 and transport.rank == 1:
            model.up.weight.grad[0, 0] = float("nan")
        before = copy.deepcopy(optimizer.state_dict()["state"])
        try:
            optimizer.step()
        except NonFiniteUpdateError:
            raised.append(step)
            for i, (p, name) in enumerate((p, n) for n, p in optimizer.named_parameters()):
                assert torch.equal(optimizer.state[p]["shared"], before[i]["shared"]), name
    optimizer.synchronize()
    return raised, check_replicas(model.named_parameters(), transport), optimizer.skipped_steps


@pytest.mark.filterwarnings("ignore:ChainOptimizer")
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_nan_is_raised_by_all_in_the_step_that_would_have_merged(nonfinite):
    first, second = lockstep(lambda transport: _poisoned(transport, nonfinite), 2)
    # Left out in step 3; sent with the fragment of step 4, whose result was to be merged in step 5.
    assert first[0] == second[0] == ([4] if nonfinite == "raise" else [])
    assert first[1] == second[1]
    assert second[2] == 1


def test_a_damaged_payload_is_raised_when_it_would_have_been_merged_and_changes_nothing_shared():
    count = itertools.count()

    def damage(rank, payload):
        return payload[:-1] + bytes([payload[-1] ^ 1]) if rank == 1 and next(count) == 1 else payload

    def replica(transport):
        channel = transport.channel

        def forged():
            made = channel()
            gather = made.transport.gather
            made.transport.gather = lambda payload, *, purpose="update": gather(
                damage(transport.rank, payload) if purpose == "update" else payload, purpose=purpose
            )
            return made

        transport.channel = forged
        model = SmallNet()
        optimizer = built(model, transport, fragments=2, delay=2)
        train(model, optimizer, 5, rank=transport.rank, world_size=2)
        before, shared = copy.deepcopy(optimizer.state_dict()["state"]), dict(optimizer.shared())
        shared = {name: weight.clone() for name, weight in shared.items()}
        with pytest.raises(PayloadError, match="from replica 1"):
            train(model, optimizer, 1, start=5, rank=transport.rank, world_size=2)
        assert all(torch.equal(weight, shared[name]) for name, weight in optimizer.shared())
        for i, (name, p) in enumerate(optimizer.named_parameters()):
            if optimizer.state[p]["fragment"]["index"] == 1:
                residual = optimizer.state[p]["outer"]["exchange"]["residual"]
                assert torch.equal(residual, before[i]["outer"]["exchange"]["residual"]), name
        # The fragment is sent again in the next step.
        train(model, optimizer, 4, start=6, rank=transport.rank, world_size=2)
        optimizer.synchronize()
        return check_replicas(model.named_parameters(), transport)

    assert len(set(lockstep(replica, 2))) == 1


def _dies_in_flight():
    transport = ProcessGroupTransport()
    model = SmallNet()
    optimizer = built(model, transport, fragments=2, delay=3)
    before = None
    try:
        for step in range(STEPS):
            if transport.rank == 1 and step == 3:
                # Its part of the fragment of step 2 has left; that of step 4 never does.
                optimizer.state_dict()
                os._exit(1)
            train(model, optimizer, 1, start=step, rank=transport.rank, world_size=2)
            before = {name: weight.clone() for name, weight in optimizer.shared()}
    except ReplicaLostError as error:
        moved = [name for name, weight in optimizer.shared() if not torch.equal(weight, before[name])]
        return error.rank, optimizer.num_steps, moved
    return None


def test_a_replica_that_dies_while_a_fragment_travels_is_named_when_it_would_have_been_merged():
    lost, _ = run_replicas(_dies_in_flight, 2, expect_lost=(1,))
    # The fragment of step 2 is merged in step 5; that of step 4 would be in step 7.
    assert lost == (1, 7, [])


def _slow_messages():
    """The channel's messages do not leave before the replica has taken two more steps."""
    transport = ProcessGroupTransport()
    channel, go_on, taken = transport.channel, threading.Semaphore(0), []

    def slowed():
        made = channel()
        gather = made.transport.gather

        def late(payload, *, purpose="update"):
            if purpose == "update":
                assert go_on.acquire(timeout=30), f"the replica stands still after {taken}"
            return gather(payload, purpose=purpose)

        made.transport.gather = late
        return made

    transport.channel = slowed
    model = SmallNet()
    optimizer = built(model, transport, interval=4, delay=3)
    for step in range(12):
        if step in (6, 10):
            go_on.release()
        train(model, optimizer, 1, start=step, rank=transport.rank, world_size=2)
        taken.append(step + 1)
    meter = transport.meter
    return shared_digest(optimizer, transport), taken, meter.overlap_s


def test_steps_go_on_while_messages_travel():
    results = run_replicas(_slow_messages, 2)
    expected = lockstep(
        lambda transport: _plain(transport, interval=4, delay=3),
        2,
    )
    for rank, (digest, taken, overlap_s) in enumerate(results):
        assert digest == expected[0]
        assert taken == list(range(1, 13))
        assert set(overlap_s) <= {str(1 - rank)}


def _plain(transport, **options):
    model = SmallNet()
    optimizer = built(model, transport, **options)
    train(model, optimizer, 12, rank=transport.rank, world_size=2)
    return shared_digest(optimizer, transport)


def _on_arrival(slow):
    """Replica 0 is two steps ahead of replica 1 while the message travels; both merge in the same step."""
    transport = ProcessGroupTransport()
    model = SmallNet()
    optimizer = built(model, transport, interval=6, merge="arrival", fragments=2)
    merged, digests = [], []
    for step in range(14):
        before = optimizer.param_groups[0]["synchronizations"]
        train(model, optimizer, 1, start=step, rank=transport.rank, world_size=2)
        if slow and transport.rank == 1:
            threading.Event().wait(0.02)
        if optimizer.param_groups[0]["synchronizations"] != before:
            merged.append(step + 1)
            digests.append({n: w.clone() for n, w in optimizer.shared()})
    optimizer.synchronize()
    return merged, digests, check_replicas(model.named_parameters(), transport)


@pytest.mark.parametrize("slow", [False, True])
def test_on_arrival_all_replicas_merge_in_the_same_step(slow):
    (merged, digests, end), (others, other_digests, other_end) = run_replicas(_on_arrival, 2, slow)
    assert merged == others
    # Each is merged before it is sent again; the fragments of steps 3, 6, 9 and 12 at least one step after they were sent.
    assert len(merged) >= 3
    assert all(any(sent < at < sent + 6 for at in merged) for sent in (3, 6, 9))
    for one, other in zip(digests, other_digests, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert end == other_end


def _bytes(fragments):
    transport = ProcessGroupTransport()
    model = SmallNet(vocabulary=64, width=32, hidden=64)
    optimizer = built(model, transport, fragments=fragments, delay=1 if fragments > 1 else 0)
    sent = [0]
    for step in range(4 * INTERVAL):
        train(model, optimizer, 1, start=step, rank=transport.rank, world_size=2)
        optimizer.state_dict()
        spent = transport.meter.by_purpose.get("update")
        sent.append(0 if spent is None else spent.egress_bytes)
    steps = [b - a for a, b in itertools.pairwise(sent)][INTERVAL:]
    return sum(steps), max(steps)


def test_all_fragments_together_send_the_same_bytes_and_the_peak_falls():
    (whole, peak), _ = run_replicas(_bytes, 2, 1)
    (cut_up, lower), _ = run_replicas(_bytes, 2, 2)
    # A frame and a payload's header more for each fragment.
    assert whole < cut_up < 1.25 * whole
    assert lower < 0.7 * peak


class _Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, inputs):
        return self.last(self.norm(self.first(inputs)))


def test_buffers_are_averaged_once_an_interval():
    def replica(transport):
        model = _Normed()
        optimizer = built(model, transport, fragments=2, delay=1)
        seen = []
        for step in range(9):
            generator = torch.Generator().manual_seed(2 * step + transport.rank)
            model(torch.randn(6, 4, generator=generator)).square().mean().backward()
            sent = model.norm.running_mean.clone()
            optimizer.step()
            optimizer.zero_grad()
            seen.append((sent, model.norm.running_mean.clone()))
        optimizer.synchronize()
        return seen, model.norm.running_mean

    (one, end), (other, other_end) = lockstep(replica, 2)
    for step in range(9):
        # Those of step 2, 6, ... as of when they were sent, a step later.
        if step in (2, 6):
            mean = (one[step - 1][0] + other[step - 1][0]) / 2
            assert torch.allclose(one[step][1], mean)
            assert torch.equal(one[step][1], other[step][1])
        else:
            assert not torch.equal(one[step][1], other[step][1])
    assert torch.equal(end, other_end)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"interval": 4, "fragments": 5},
            r"fragments is 5; with an interval \(H\) of 4 it must be from 1 to 4",
        ),
        ({"interval": 4, "fragments": 0}, "fragments is 0"),
        ({"interval": 4, "delay": 4}, r"delay is 4; with an interval \(H\) of 4 it must be from 0 to 3"),
        ({"interval": 4, "delay": -1}, "delay is -1"),
        ({"interval": 4, "mix": 1.5}, r"mix is 1.5; it must be in \[0, 1\]"),
        ({"interval": 4, "merge": "late"}, "merge is 'late'; allowed are 'fixed' and 'arrival'"),
        ({"interval": 4, "merge": "arrival", "delay": 1}, "leave delay out"),
    ],
)
def test_bad_settings_say_what_is_allowed(options, says):
    with pytest.raises(UsageError, match=says):
        LocalSteps(**options)


def test_more_fragments_than_tensors_are_refused():
    with pytest.raises(UsageError, match="fragments is 8, and there are 6 trained tensors"):
        built(SmallNet(), interval=8, fragments=8)


def test_a_transport_without_a_second_channel_says_what_to_use():
    class Alone(Transport):
        rank, world_size = 0, 2

        def gather(self, payload, *, purpose="update"):
            return [payload, payload]

        def all_to_all(self, payloads, *, purpose="update"):
            return [payloads[0]] * 2

        def mean(self, tensors, *, purpose="update"):
            return list(tensors)

    model = SmallNet()
    optimizer = built(model, Alone(), delay=1)
    with pytest.raises(UsageError, match=r"has no second channel.*fragments=1 and delay=0"):
        train(model, optimizer, 1)


def test_the_weights_in_between_are_a_replicas_own():
    def replica(transport):
        model = SmallNet()
        optimizer = built(model, transport, delay=2)
        train(model, optimizer, 6, rank=transport.rank, world_size=2)
        return weights(model), {n: w.clone() for n, w in optimizer.shared()}

    (own, shared), (others, others_shared) = lockstep(replica, 2)
    assert all(torch.equal(shared[n], others_shared[n]) for n in shared)
    assert not any(torch.equal(own[n], others[n]) for n in own)
