"""Optimizers whose replicas act as sites, against as many replicas that each see the mean gradient of a site."""

import copy
import os
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from muonwire import recipes, stages
from muonwire.codec import parse
from muonwire.errors import (
    DivergedReplicasError,
    ExchangeError,
    NonFiniteUpdateError,
    PayloadError,
    ReplicaLostError,
    UsageError,
)
from muonwire.optim import ChainOptimizer, LocalSteps, agreement, local_steps
from muonwire.polar import find_processor
from muonwire.polar.processor import named_processor
from muonwire.transport import check_replicas, run_threads, site_transport
from tests.models import RECIPE_OPTIONS, VARIANTS, SmallNet, batch, goes_its_own_way, loss, train, weights
from tests.replicas import run_replicas
from tests.slow import slow_unless

SITES, INSIDE, STEPS = 2, 2, 8
SHARED = {"codec": "sign(scale=shared)", "vector_codec": "sign(scale=shared)"}
CASES = [
    *((name, RECIPE_OPTIONS.get(name, {})) for name in recipes.RECIPES),
    *VARIANTS,
    ("local_muon", {"interval": 3, "fragments": 3}),
]
every_recipe = pytest.mark.parametrize(
    ("name", "options"),
    slow_unless(goes_its_own_way, CASES, ids=lambda *case: recipes.format_recipe(*case)),
)


def gradients(model, step, rank, world_size):
    model.zero_grad()
    loss(model, batch(step, rank, world_size)).backward()
    return [p.grad.clone() for p in model.parameters()]


def update_bytes(transport):
    training = transport.meter.training
    return training.sent_bytes, training.egress_bytes, training.received_bytes, training.num_messages


def by_site(transport, name, options, steps=STEPS, inside=INSIDE):
    """One of the replicas of the sites; its losses are its own."""
    everyone = transport.everyone
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    for step in range(steps):
        gradients(model, step, everyone.rank, everyone.world_size)
        optimizer.step()
    optimizer.synchronize()
    return weights(model), optimizer.state_dict()["state"], update_bytes(transport), transport.is_leader


def by_hand(transport, name, options, inside=INSIDE):
    """A replica that stands for a site: it averages the gradients of all its batches by itself."""
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    for step in range(STEPS):
        parts = [
            gradients(model, step, transport.rank * inside + i, transport.world_size * inside)
            for i in range(inside)
        ]
        for p, first, *others in zip(model.parameters(), *parts, strict=True):
            p.grad = first.clone()
            for g in others:
                p.grad += g
            p.grad /= inside
        optimizer.step()
    optimizer.synchronize()
    return weights(model), optimizer.state_dict()["state"], update_bytes(transport)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


@every_recipe
def test_sites_are_replicas_that_see_the_mean_gradient(name, options):
    """To the last bit, in weights and states, and the same bytes cross between sites as between as many replicas."""
    expected = run_threads(lambda _, make: by_hand(make(), name, options), replicas=SITES)
    found = run_threads(
        lambda _, make: by_site(site_transport(make(), sites=SITES), name, options), replicas=SITES * INSIDE
    )
    for rank, (model, states, traffic, leads) in enumerate(found):
        site = rank // INSIDE
        assert_same(model, expected[site][0])
        if options.get("merge") != "arrival":
            assert_same(states, expected[site][1])
        assert leads == (rank % INSIDE == 0)
        assert traffic == (expected[site][2] if leads else (0, 0, 0, 0))


def in_sites(worker, replicas=SITES * INSIDE, **options):
    """``worker(transport, rank)`` on every replica; what each returns."""
    return run_threads(
        lambda rank, make: worker(site_transport(make(), sites=SITES, **options), rank), replicas=replicas
    )


@pytest.mark.parametrize("name", ["muon", "one_bit_muon"])
def test_sites_of_three(name):
    options = RECIPE_OPTIONS.get(name, {})
    expected = run_threads(lambda _, make: by_hand(make(), name, options, inside=3), replicas=SITES)
    found = in_sites(lambda transport, _: by_site(transport, name, options, inside=3), replicas=6)
    for rank, (model, states, _, _) in enumerate(found):
        assert_same(model, expected[rank // 3][0])
        assert_same(states, expected[rank // 3][1])


PROCESS_CASES = [
    ("muon", {}),
    ("ef14_muon", {"means": "recompressed"}),
    ("one_bit_muon", {"interval": 3, "means": "lossless", **SHARED}),
    ("one_bit_muon", {"interval": 3, "fragments": 2, "delay": 1}),
    ("local_muon", {"interval": 4, "merge": "arrival"}),
]


def _in_processes():
    return [by_site(site_transport(sites=SITES), name, options) for name, options in PROCESS_CASES]


def test_processes_come_to_what_threads_come_to():
    """Where a result is merged on arrival, when that is follows from the link: the sites agree with each other all the same."""
    by_rank = run_replicas(_in_processes, SITES * INSIDE)
    for i, (name, options) in enumerate(PROCESS_CASES):
        of_processes = [results[i] for results in by_rank]
        for model, _, _, _ in of_processes:
            assert_same(model, of_processes[0][0])
        for mate in range(1, INSIDE):
            assert_same(of_processes[0][1], of_processes[mate][1])
        if options.get("merge") == "arrival":
            continue
        threads = in_sites(lambda transport, _, name=name, options=options: by_site(transport, name, options))
        for here, there in zip(threads, of_processes, strict=True):
            assert_same(here[0], there[0])
            assert_same(here[1], there[1])
            assert here[2:] == there[2:]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ef14_muon", {"means": "recompressed"}),
        ("one_bit_muon", {"interval": 3, "means": "lossless", **SHARED}),
        ("one_bit_muon", {"interval": 4, "fragments": 2, "delay": 3}),
        ("psyche", {"delayed": True}),
    ],
)
def test_a_run_that_is_resumed_at_any_step_goes_on_as_the_undisturbed_one(name, options):
    expected = in_sites(lambda transport, _: by_site(transport, name, options))

    def resumed(transport, rank):
        model = SmallNet()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        for step in range(STEPS):
            gradients(model, step, rank, SITES * INSIDE)
            optimizer.step()
            held, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = SmallNet(seed=3)
            optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
            model.load_state_dict(held)
            optimizer.load_state_dict(state)
        optimizer.synchronize()
        return weights(model)

    for found, (undisturbed, *_) in zip(in_sites(resumed), expected, strict=True):
        assert_same(found, undisturbed)


@pytest.mark.filterwarnings("ignore:ChainOptimizer. :UserWarning", "ignore:ChainOptimizer:UserWarning")
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("muon", {}), ("one_bit_muon", {"interval": 3}), ("one_bit_muon", {"interval": 3, "delay": 1})],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_one_of_the_whole_site(name, options, nonfinite, at):
    """Replica 1 has it; all goes as with two replicas, of which the first has it."""

    def trained(transport, batches):
        model = SmallNet()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, nonfinite=nonfinite, **options)
        raised = []
        for step in range(8):
            parts = [gradients(model, step, rank, 4) for rank in batches]
            if step == at and 1 in batches:
                parts[batches.index(1)][1][1, 2] = float("nan")
            for p, *grads in zip(model.parameters(), *parts, strict=True):
                p.grad = sum(grads[1:], start=grads[0].clone()) / len(grads)
            try:
                optimizer.step()
            except NonFiniteUpdateError:
                raised.append(step)
        optimizer.synchronize()
        return raised, optimizer.skipped_steps, check_replicas(model.named_parameters(), transport)

    expected = run_threads(lambda r, make: trained(make(), [2 * r, 2 * r + 1]), replicas=2)
    found = in_sites(lambda transport, rank: trained(transport, [rank]))
    assert found == [expected[0], expected[0], expected[1], expected[1]]
    assert bool(expected[1][0]) == (nonfinite == "raise")
    assert expected[0][1] == 1 or nonfinite == "raise"


def test_an_overflow_of_one_scaler_leaves_the_step_out_on_its_site():
    def worker(transport, rank):
        model = SmallNet()
        optimizer = recipes.build("one_bit_muon", model, lr=0.01, transport=transport, interval=3)
        for step in range(4):
            gradients(model, step, rank, SITES * INSIDE)
            optimizer.grad_scale = torch.tensor(1.0)
            optimizer.found_inf = torch.tensor(float(step == 1 and rank == 3))
            optimizer.step()
        optimizer.synchronize()
        return optimizer.skipped_steps, check_replicas(model.named_parameters(), transport)

    found = in_sites(worker)
    assert [skipped for skipped, _ in found] == [0, 0, 1, 1]
    assert len({digest for _, digest in found}) == 1


OUTER = stages.chain(stages.Exchange(codec=parse("sign(scale=tensor)"), feedback=stages.EF14(decay=0.5)))


def test_a_wrapped_optimizer_steps_with_the_mean_of_the_site():
    def trained(transport, batches):
        model = SmallNet()
        optimizer = local_steps(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            outer_chain=OUTER,
            local=LocalSteps(interval=3),
            transport=transport,
        )
        for step in range(STEPS):
            parts = [gradients(model, step, rank, 4) for rank in batches]
            for p, *grads in zip(model.parameters(), *parts, strict=True):
                p.grad = sum(grads[1:], start=grads[0].clone()) / len(grads)
            optimizer.step()
        optimizer.synchronize()
        return weights(model)

    expected = run_threads(lambda r, make: trained(make(), [2 * r, 2 * r + 1]), replicas=2)
    for found in in_sites(lambda transport, rank: trained(transport, [rank])):
        assert_same(found, expected[0])


def test_a_parameter_has_a_gradient_where_any_replica_of_the_site_has_one():
    def worker(transport, rank):
        params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
        optimizer = local_steps(
            torch.optim.SGD(params, lr=1.0, weight_decay=0.5),
            outer_chain=OUTER,
            local=LocalSteps(interval=9),
            transport=transport,
        )
        params[0].grad = torch.full((2,), float(rank))
        if rank % 2:
            params[1].grad = torch.full((2,), 4.0)
        optimizer.step()
        return [None if p.grad is None else p.grad[0].item() for p in params], params[2][0].item()

    for rank, (found, untouched) in enumerate(in_sites(worker)):
        assert found == [0.5 + 2 * (rank // 2), 2.0, None]
        # A step without a gradient leaves it alone; with one of zeros it would decay.
        assert untouched == 1.0


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("muon", {}),
        ("one_bit_muon", {"interval": 3}),
        ("one_bit_muon", {"interval": 4, "fragments": 2, "delay": 1}),
    ],
)
def test_buffers_are_averaged_inside_sites_and_between_them(name, options):
    def worker(transport, rank):
        model = WithBuffers()
        optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
        for step in range(5):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(4 * step + rank))
            optimizer.zero_grad()
            (model(x) - x[:, :2]).square().mean().backward()
            optimizer.step()
        own = model.norm.running_mean.clone()
        optimizer.synchronize()
        return check_replicas(model, transport), own, model.norm.running_mean.clone()

    found = in_sites(worker)
    assert len({digest for digest, _, _ in found}) == 1
    own = torch.stack([own for _, own, _ in found])
    assert not torch.equal(own[0], own[1])
    assert torch.allclose(found[0][2], own.mean(0), atol=1e-6)


def _with_ddp(averages):
    transport = site_transport(sites=SITES, averages=averages)
    rank = transport.everyone.rank
    model = SmallNet()
    optimizer = recipes.build("one_bit_muon", model, lr=0.01, transport=transport, interval=3)
    called = model if averages else DistributedDataParallel(model, process_group=transport.inside.group)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(called, batch(step, rank, 4)).backward()
        optimizer.step()
    optimizer.synchronize()
    return check_replicas(model.named_parameters(), transport), str(optimizer).partition(";")[0]


def test_distributed_data_parallel_may_average_inside_a_site():
    """Of two replicas, halves are exact: the same bits as where the optimizer averages."""
    by_optimizer, by_loop = run_replicas(_with_ddp, 4, True), run_replicas(_with_ddp, 4, False)
    assert {digest for digest, _ in by_loop} == {digest for digest, _ in by_optimizer}
    assert len({digest for digest, _ in by_loop}) == 1
    about = "ChainOptimizer (2 sites of 2 replicas, "
    assert by_optimizer[0][1] == about + "their gradients averaged at every step"
    assert by_loop[0][1] == about + "their gradients averaged by the loop"


def test_gradients_that_nobody_averages_are_noticed():
    def worker(transport, rank):
        model = SmallNet()
        optimizer = recipes.build("one_bit_muon", model, lr=0.01, transport=transport, interval=3)
        with pytest.raises(DivergedReplicasError, match=rf"the replicas of site {rank // 2} are not alike"):
            train(model, optimizer, 3, rank=rank, world_size=4)

    in_sites(worker, averages=False)


def test_sites_may_start_from_the_first_replicas_weights():
    def worker(transport, rank):
        model = SmallNet(seed=rank)
        optimizer = recipes.build(
            "one_bit_muon", model, lr=0.01, transport=transport, interval=3, start="broadcast"
        )
        begun = weights(model)
        train(model, optimizer, 4, rank=rank, world_size=4)
        return begun

    for begun in in_sites(worker):
        assert_same(begun, weights(SmallNet(seed=0)))


def test_another_start_inside_a_site_is_an_error_on_all():
    errors = []

    def worker(transport, rank):
        model = SmallNet(seed=int(rank == 1))
        optimizer = recipes.build("muon", model, lr=0.01, transport=transport)
        with pytest.raises(ExchangeError) as caught:
            train(model, optimizer, 1, rank=rank, world_size=4)
        errors.append((rank, type(caught.value), str(caught.value)))

    in_sites(worker)
    for rank, kind, text in errors:
        if rank < 2:
            assert kind is DivergedReplicasError
            assert "the replicas of site 0 are not alike: what replica(s) 1 would send" in text
        else:
            assert "site 0 (replicas 0 to 1) cannot go on" in text


def test_replicas_of_a_site_follow_the_slowest_of_their_processors(monkeypatch):
    """In the local steps; other sites go their own way there."""
    here = threading.local()
    monkeypatch.setattr(
        agreement, "find_processor", lambda device: getattr(here, "processor", None) or find_processor(device)
    )

    def worker(transport, rank):
        here.processor = named_processor(["amx", "avx2", "amx", "amx"][rank])
        model = SmallNet()
        optimizer = recipes.build("one_bit_muon", model, lr=0.01, transport=transport, interval=3)
        train(model, optimizer, 3, rank=rank, world_size=4)
        return optimizer.param_groups[0]["processor"]

    assert in_sites(worker) == ["avx2", "avx2", "amx", "amx"]


@pytest.mark.parametrize("means", ["gather", "lossless", "recompressed"])
@pytest.mark.parametrize("delay", [0, 1])
def test_a_damaged_payload_between_sites_is_one_error_on_all_and_nothing_has_changed(means, delay):
    def worker(transport, rank):
        model = SmallNet()
        options = {"interval": 3, "delay": delay, "means": means, **(SHARED if means == "lossless" else {})}
        optimizer = recipes.build("one_bit_muon", model, lr=0.01, transport=transport, **options)
        train(model, optimizer, 2, rank=rank, world_size=4)
        if delay:
            optimizer.streaming.open()
            transport = optimizer.streaming.channel.transport
        if rank == 2:
            forge(transport.between)
        before = copy.deepcopy({name: p.clone() for name, p in optimizer.shared()})
        with pytest.raises(PayloadError) as caught:
            train(model, optimizer, 1 + delay, start=2, rank=rank, world_size=4)
        assert_same(dict(optimizer.shared()), before)
        return str(caught.value)

    found = in_sites(worker)
    assert len(set(found)) == 1
    assert found[0].startswith("between sites, which are the replicas here: from replica 1")


def forge(between):
    """Turn over a bit in the middle of what a leader sends as an update."""

    def damaged(payload, purpose):
        return (
            payload
            if purpose != "update" or len(payload) < 40
            else payload[:30] + bytes([payload[30] ^ 1]) + payload[31:]
        )

    gather, all_to_all = between.gather, between.all_to_all
    between.gather = lambda payload, *, purpose="update", observers=False: gather(
        damaged(payload, purpose), purpose=purpose, observers=observers
    )
    between.all_to_all = lambda payloads, *, purpose="update": all_to_all(
        [damaged(p, purpose) for p in payloads], purpose=purpose
    )


def _killed(victim, name, options):
    transport = site_transport(sites=SITES)
    rank = transport.everyone.rank
    model = SmallNet()
    optimizer = recipes.build(name, model, lr=0.01, transport=transport, **options)
    before = None
    try:
        for step in range(STEPS + 1):
            before = copy.deepcopy(dict(optimizer.shared()))
            if step == 4 and rank == victim:
                os._exit(1)
            if step == STEPS:
                optimizer.synchronize()
            else:
                train(model, optimizer, 1, start=step, rank=rank, world_size=4)
    except ReplicaLostError as error:
        # The others do not learn it from the end of this process.
        time.sleep(0.5)
        assert_same(dict(optimizer.shared()), before)
        return error.rank, str(error)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ef14_muon", {}), ("one_bit_muon", {"interval": 3}), ("one_bit_muon", {"interval": 4, "delay": 3})],
)
@pytest.mark.parametrize("victim", [0, 3])
def test_a_replica_that_is_lost_ends_all_with_its_name(victim, name, options):
    results = run_replicas(_killed, 4, victim, name, options, expect_lost=(victim,))
    for rank, result in enumerate(results):
        assert result is None if rank == victim else result[0] == victim, result
        assert rank == victim or f"replica {victim}" in result[1]


def test_a_step_twice_with_the_same_gradient_is_noticed_inside_the_site():
    def worker(transport, rank):
        model = SmallNet()
        optimizer = recipes.build("one_bit_muon", model, lr=0.01, transport=transport, interval=5)
        train(model, optimizer, 2, rank=rank, world_size=4)
        optimizer.zero_grad(set_to_none=False)
        assert transport.step == 2
        if rank == 1:
            with pytest.raises(ExchangeError, match="out of step"):
                optimizer.step()
            return
        with pytest.raises(ExchangeError):
            train(model, optimizer, 3, start=2, rank=rank, world_size=4)

    in_sites(worker)


def test_sparse_gradients_are_refused():
    def worker(transport, rank):
        param = nn.Parameter(torch.ones(3, 2))
        optimizer = ChainOptimizer([param], chain=stages.Mean(), lr=0.1, transport=transport)
        param.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2))
        with pytest.raises(UsageError, match="is sparse or sharded, and a site averages whole dense ones"):
            optimizer.step()

    in_sites(worker)
