"""Replicas in sites: what they exchange, what is counted where, and what goes wrong."""

import os
import pickle
import time
from datetime import timedelta

import pytest
import torch

from muonwire.errors import DivergedReplicasError, ExchangeError, ReplicaLostError, UsageError
from muonwire.transport import (
    Flag,
    ProcessGroupTransport,
    SingleReplica,
    check_replicas,
    run_threads,
    site_groups,
    site_transport,
)
from muonwire.transport.relay import pack, unpack
from muonwire.transport.secret import Secret
from tests.replicas import ReplicaFailedError, run_replicas


def tensors(site):
    generator = torch.Generator().manual_seed(site)
    return [
        torch.randn(7, 3, generator=generator),
        torch.randn(5, generator=generator, dtype=torch.float64),
        torch.randn(11, generator=generator).to(torch.bfloat16),
        torch.zeros(0),
        torch.tensor(float(site)),
    ]


def counted(traffic):
    return traffic.sent_bytes, traffic.egress_bytes, traffic.received_bytes, traffic.num_messages


def talk(transport):
    """What a site says depends on its number only; so does a replica that stands for it."""
    site, sites = transport.rank, transport.world_size
    gathered = [
        transport.gather(bytes([site]) * (size * (site + 1))) for size in (0, 3, 900, 900, 900, 1_200_000, 5)
    ]
    exchanged = [
        transport.all_to_all([bytes([10 * site + j]) * (size + j) for j in range(sites)])
        for size in (0, 40, 40, 2000)
    ]
    means = transport.mean(tensors(site))
    nothing = transport.mean([])
    digest = check_replicas([("w", means[0])], transport)
    control = transport.gather(b"c", purpose="control")
    by_purpose = {purpose: counted(traffic) for purpose, traffic in transport.meter.by_purpose.items()}
    return gathered, exchanged, means, nothing, digest, control, by_purpose


def talk_in_sites(sites):
    transport = site_transport(sites=sites)
    return talk(transport), transport.is_leader


def talk_plainly():
    return talk(ProcessGroupTransport())


def same(here, there):
    assert here[:2] == there[:2]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(here[2], there[2], strict=True))
    assert here[3:6] == there[3:6]


@pytest.mark.parametrize(("sites", "inside"), [(2, 1), (2, 2), (3, 2), (2, 3)])
def test_sites_exchange_what_as_many_replicas_do_to_the_last_bit_and_byte(sites, inside):
    plain = run_threads(lambda _, make: talk(make()), replicas=sites)

    def worker(rank, make):
        transport = site_transport(make(), sites=sites)
        assert (transport.rank, transport.world_size, transport.num_inside) == (rank // inside, sites, inside)
        assert transport.everyone.rank == rank
        return talk(transport), transport.is_leader

    for rank, (found, leads) in enumerate(run_threads(worker, replicas=sites * inside)):
        same(found, plain[rank // inside])
        assert leads == (rank % inside == 0)
        expected = plain[rank // inside][6]
        assert found[6] == (expected if leads else dict.fromkeys(expected, (0, 0, 0, 0)))


def test_processes_exchange_what_threads_do():
    threads = run_threads(lambda _, make: talk(site_transport(make(), sites=2)), replicas=4)
    for here, (there, _) in zip(threads, run_replicas(talk_in_sites, 4, 2), strict=True):
        same(here, there)
        assert here[6] == there[6]


def _sealed():
    whole = ProcessGroupTransport(secret=Secret(bytes(range(32))), run="a")
    transport = site_transport(whole, sites=2)
    channel = transport.channel()
    beside = channel.start(lambda: channel.transport.gather(b"beside %d" % transport.rank))
    gathered = transport.gather(b"site %d" % transport.rank)
    beside = beside.result()
    sealed = all(
        part._links is not None for part in (transport.inside, transport.between) if part is not None
    )
    transport.close()
    whole.close()
    return gathered, beside, sealed


def test_a_secret_seals_the_ways_of_the_sites_too():
    expected = ([b"site 0", b"site 1"], [b"beside 0", b"beside 1"], True)
    assert run_replicas(_sealed, 4) == [expected] * 4


def _channel():
    transport = site_transport(sites=2)
    channel, other = transport.channel(), None
    other = channel.transport
    rank = transport.everyone.rank
    works = [channel.start(lambda i=i: other.gather(bytes([i, other.rank]))) for i in range(3)]
    main = [transport.mean_inside([torch.tensor([float(rank)])])[0].item() for _ in range(3)]
    results = [work.result() for work in works]
    return main, results, other.inside_traffic.sent_bytes > 0, transport.inside_traffic.sent_bytes


def test_a_channel_goes_its_own_way_inside_and_between_sites():
    for rank, (main, results, beside, sent) in enumerate(run_replicas(_channel, 4)):
        assert main == [0.5 + 2 * (rank // 2)] * 3
        assert results == [[bytes([i, 0]), bytes([i, 1])] for i in range(3)]
        assert beside
        assert sent > 0


def test_the_mean_inside_is_the_sum_in_rank_order_and_crosses_no_slow_link():
    def worker(rank, make):
        transport = site_transport(make(), sites=2)
        own = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
        (mean,) = transport.mean_inside([own])
        notes = transport.gather_inside(b"note %d" % rank)
        assert counted(transport.meter.total) == (0, 0, 0, 0)
        assert transport.inside_traffic.egress_bytes > 4000
        return own, mean, notes

    found = run_threads(worker, replicas=6)
    for site in (0, 1):
        of_site = found[3 * site : 3 * site + 3]
        total = of_site[0][0].clone()
        for own, _, _ in of_site[1:]:
            total += own
        for _, mean, notes in of_site:
            assert torch.equal(mean, total / 3)
            assert notes == [b"note %d" % r for r in range(3 * site, 3 * site + 3)]


def test_elsewhere_a_site_has_one_replica():
    transport = SingleReplica()
    assert transport.everyone is transport
    assert transport.gather_inside(b"a") == [b"a"]
    own = torch.ones(2)
    assert transport.mean_inside([own])[0] is own
    assert transport.inside_traffic.sent_bytes == 0


@pytest.mark.parametrize("flagged", [0, 1, 3])
def test_flags_of_any_replica_are_agreed_on_all_after_the_same_operation(flagged):
    def worker(rank, make):
        transport = site_transport(make(), sites=2)
        transport.gather(b"")
        seen = [transport.agreed]
        if rank == flagged:
            transport.requested |= Flag.STOP
        # What goes on inside a site is not of all.
        transport.mean_inside([torch.ones(1)])
        seen.append(transport.agreed)
        transport.all_to_all([b"", b""])
        return [*seen, transport.agreed]

    assert run_threads(worker, replicas=4) == [[Flag.NONE, Flag.NONE, Flag.STOP]] * 4


def test_the_leaders_carry_the_step_and_replicas_out_of_step_are_an_error_on_all():
    def worker(rank, make):
        transport = site_transport(make(), sites=2)
        transport.step = 4 + rank // 2
        with pytest.raises(
            ExchangeError, match=r"between sites, .* replica 0 is in step 4 .* replica 1 in step 5"
        ) as caught:
            transport.gather(b"")
        with pytest.raises(ExchangeError, match="failed before and cannot be used again"):
            transport.gather(b"")
        with pytest.raises(ExchangeError, match="failed before and cannot be used again"):
            transport.mean_inside([torch.ones(1)])
        return str(caught.value)

    assert len(set(run_threads(worker, replicas=4))) == 1


def _unlike(way):
    """Replica 1 is not like replica 0 of its site."""
    transport = site_transport(sites=2)
    odd = transport.everyone.rank == 1
    try:
        if way == "payload":
            transport.gather(b"odd" if odd else b"even")
        elif way == "mean":
            transport.mean([torch.full((3,), float(odd))])
        elif way == "step":
            transport.step = 7 if odd else 6
            transport.all_to_all([b"", b""])
        elif way == "operation":
            transport.gather(b"") if odd else transport.mean([])
    except ExchangeError as error:
        # The others do not get it from the end of this process.
        time.sleep(0.3)
        return type(error).__name__, str(error)


@pytest.mark.parametrize("way", ["payload", "mean", "step", "operation"])
def test_replicas_of_a_site_that_are_not_alike_are_an_error_on_all(way):
    own, mate, *others = run_replicas(_unlike, 4, way)
    assert own == mate
    kind, text = own
    if way != "step":
        assert kind == "DivergedReplicasError"
        assert "the replicas of site 0 are not alike: what replica(s) 1 would send" in text
    else:
        assert kind == "ExchangeError"
        assert "replicas are out of step: replica 0 is in step" in text
    assert (
        others
        == [
            (
                "ExchangeError",
                f"site 0 (replicas 0 to 1) cannot go on, in step {0 if way != 'step' else 6}; its own replicas say why",
            )
        ]
        * 2
    )


def _killed(victim, when):
    transport = site_transport(sites=2)
    rank = transport.everyone.rank
    try:
        for step in range(4):
            transport.step = step
            if rank == victim and step == 2 and when == "before the mean":
                os._exit(1)
            transport.mean_inside([torch.ones(3)])
            if rank == victim and step == 2:
                os._exit(1)
            transport.gather(bytes(5000))
    except ReplicaLostError as error:
        time.sleep(0.5)
        return step, error.rank, str(error)


@pytest.mark.parametrize("when", ["before the mean", "after it"])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_all_survivors_name_the_replica_that_is_lost(victim, when):
    results = run_replicas(_killed, 4, victim, when, expect_lost=(victim,))
    assert results[victim] is None
    survivors = [r for r in range(4) if r != victim]
    for rank in survivors:
        assert not isinstance(results[rank], ReplicaFailedError), results[rank]
        step, lost, text = results[rank]
        assert (step, lost) == (2, victim)
        assert f"replica {victim}" in text
        if rank // 2 == victim // 2:
            assert text.startswith(
                f"replica {rank} of site {rank // 2} lost replica {victim} of its site in step 2; "
            )
        elif victim % 2:
            assert text == (
                f"site {rank // 2} lost site {victim // 2} in step 2, since that one lost its replica {victim}"
            )
        else:
            assert text.startswith(
                f"site {rank // 2} lost replica {victim}, which leads site {victim // 2}, in step 2; "
            )


def _reported_on_a_channel(victim):
    """The others listen on the channel when a replica is lost in the mean of its site."""
    transport = site_transport(sites=2)
    channel = transport.channel()
    if transport.everyone.rank == victim:
        time.sleep(0.3)
        os._exit(1)
    try:
        if transport.rank == victim // 2:
            transport.mean_inside([torch.ones(3)])
        else:
            channel.start(lambda: channel.transport.gather(b"")).result()
    except ReplicaLostError as error:
        time.sleep(0.5)
        return error.rank


def test_a_loss_is_reported_wherever_the_others_listen():
    assert run_replicas(_reported_on_a_channel, 4, 1, expect_lost=(1,)) == [1, None, 1, 1]


def test_numbers_that_make_no_sites_are_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for options, text in (
        ({"sites": 3}, r"4 replica\(s\) in 3 site\(s\); give a number of at least 2 that divides"),
        ({"sites": 1}, r"4 replica\(s\) in 1 site\(s\)"),
        ({"sites": 8}, r"4 replica\(s\) in 8 site\(s\)"),
        ({"sites": 0}, r"4 replica\(s\) in 0 site\(s\)"),
        ({"replicas_per_site": 3}, "4 replicas with 3 a site"),
        ({"replicas_per_site": 4}, "4 replicas with 4 a site"),
        ({"replicas_per_site": 0}, "4 replicas with 0 a site"),
        ({"sites": 2, "replicas_per_site": 2}, "give one of the two numbers"),
        ({}, "no launcher has set LOCAL_WORLD_SIZE"),
    ):

        def worker(_, make, options=options, text=text):
            with pytest.raises(UsageError, match=text):
                site_transport(make(), **options)

        run_threads(worker, replicas=4)
    with pytest.raises(UsageError, match="SingleReplica of 1 replica"):
        site_transport(SingleReplica(), sites=2)


def test_a_site_is_a_machine_unless_it_is_said_otherwise(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    made = run_threads(lambda _, make: site_transport(make()).ranks, replicas=6)
    assert made == [[[0, 1, 2], [3, 4, 5]]] * 6


def test_replicas_that_give_other_numbers_are_an_error_on_all():
    def worker(rank, make):
        with pytest.raises(ExchangeError, match=r"the sites of replica\(s\) 2 differ"):
            site_transport(make(), sites=3 if rank == 2 else 2)

    run_threads(worker, replicas=6)


def test_it_is_one_per_site_in_an_all_to_all_and_cannot_be_pickled():
    def worker(_, make):
        transport = site_transport(make(), sites=2)
        with pytest.raises(UsageError, match="4 payloads for 2 replicas"):
            transport.all_to_all([b""] * 4)
        with pytest.raises(UsageError, match="SiteTransport: it cannot be pickled"):
            pickle.dumps(transport)
        assert transport.called(1) == "site 1"
        assert transport.members == ("site 0", "site 1")

    run_threads(worker, replicas=4)


def test_what_a_leader_hands_on_is_what_it_got():
    for payloads in ([], [b""], [b"abc", b"", b"x" * 1000]):
        assert unpack(pack(payloads)) == payloads


def test_a_diverged_error_stays_one_in_every_later_operation():
    def worker(rank, make):
        transport = site_transport(make(), sites=2)
        if rank > 1:
            with pytest.raises(ExchangeError):
                transport.gather(b"")
            return
        for text in ("not alike", "failed before"):
            with pytest.raises(DivergedReplicasError, match=text):
                transport.gather(bytes([rank]))

    run_threads(worker, replicas=4)


def _stands_still(victim):
    """It is waited for by those that know it, and these tell the others."""
    site_groups._limit_of = lambda whole: timedelta(seconds=2)
    site_groups.LONGER_S = 3.0
    transport = site_transport(sites=2)
    transport.gather(b"")
    if transport.everyone.rank == victim:
        time.sleep(8)
        os._exit(1)
    began_s = time.monotonic()
    try:
        transport.gather(b"")
    except ReplicaLostError as error:
        seconds = time.monotonic() - began_s
        # Not by the end of this process.
        time.sleep(1)
        return error.rank, seconds, str(error)


def test_a_replica_that_stands_still_is_named_by_its_site_to_all():
    results = run_replicas(_stands_still, 4, 1, expect_lost=(1,))
    for rank in (0, 2, 3):
        lost, seconds, text = results[rank]
        assert lost == 1, text
        assert 1.9 < seconds < 7
    assert "waited 2 s for replica 1 in step 0 and got no answer: that one stands still" in results[0][2]
    assert results[2][2] == results[3][2] == "site 1 lost site 0 in step 0, since that one lost its replica 1"
