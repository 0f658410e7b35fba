"""ElasticSiteTransport: what its leader gets reaches its site, and what goes wrong is one error on all of it."""

import os
import pickle
import re
import threading
import time

import pytest
import torch

from muonwire.errors import DivergedReplicasError, ExchangeError, ReplicaLostError, UsageError
from muonwire.transport import ProcessGroupTransport, SingleReplica, run_threads
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from muonwire.transport.elastic_sites import ElasticSiteTransport, longest_wait_s
from muonwire.transport.relay import described, raise_described
from tests.optim.test_elastic import lighthouse  # noqa: F401 - a fixture
from tests.replicas import run_replicas


def settings(lighthouse, name, **options):  # noqa: F811
    return ElasticSettings(lighthouse=lighthouse, name=name, **{"timeout_s": 5, "patience_s": 20, **options})


def in_site(worker, how, **options):
    """``worker(transport)`` on both replicas of a site, in threads that take turns."""

    def replica(_, make):
        transport = ElasticSiteTransport(how, inside=make(), **options)
        try:
            return worker(transport)
        finally:
            transport.close()

    return run_threads(replica, replicas=2)


def at_the_same_time(*acts):
    """What each returns."""
    results = [None] * len(acts)

    def run(i):
        results[i] = acts[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def talk(transport):
    assert transport.form()
    own = transport.rank
    gathered = transport.gather(bytes([own]) * (3 + own))
    exchanged = transport.all_to_all([bytes([own, j]) for j in range(2)])
    (mean,) = transport.mean([torch.tensor([1.0, 5.0]) * (own + 1)])
    transport.settle()
    assert transport.prepared
    assert transport.commit()
    return transport.members, own, gathered, exchanged, mean.tolist(), transport.epoch, transport.commits


def test_both_replicas_get_what_the_leader_exchanged_with_a_member_of_one(lighthouse):  # noqa: F811
    def single():
        transport = ElasticTransport(settings(lighthouse, "b"))
        try:
            return talk(transport)
        finally:
            transport.close()

    site, other = at_the_same_time(lambda: in_site(talk, settings(lighthouse, "a")), single)
    assert site[0] == site[1]
    assert site[0][:2] == (("a", "b"), 0)
    assert other[:2] == (("a", "b"), 1)
    assert site[0][2] == other[2] == [b"\0" * 3, b"\1" * 4]
    assert site[0][3] == [b"\0\0", b"\1\0"]
    assert other[3] == [b"\0\1", b"\1\1"]
    assert site[0][4] == other[4] == [1.5, 7.5]
    assert site[0][5:] == other[5:]


def test_what_was_exchanged_is_replayed_on_every_replica_and_nothing_is_sent(lighthouse):  # noqa: F811
    def worker(transport):
        transport.form()
        transport.attempt()
        found = transport.gather(b"ab"), transport.mean([torch.ones(2)])[0].tolist()
        before = transport.meter.total.num_messages, transport.inside.meter.total.num_messages
        with transport.replaying():
            again = transport.gather(b"xy"), transport.mean([torch.zeros(2)])[0].tolist()
            transport.settle()
            with pytest.raises(ReplicaLostError, match="ended between two of its rounds"):
                transport.gather(b"more")
        assert again == found
        assert transport.attempted == -1
        assert before == (transport.meter.total.num_messages, transport.inside.meter.total.num_messages)

    in_site(worker, settings(lighthouse, "a", min_replicas=1))


def test_an_error_between_members_is_raised_on_the_whole_site_until_it_meets_again(lighthouse):  # noqa: F811
    def worker(transport):
        transport.form()
        if transport.between is not None:
            transport.between.all_to_all = lambda *_, **__: (_ for _ in ()).throw(
                ReplicaLostError("lost", rank=0)
            )
        with pytest.raises(ReplicaLostError, match="lost") as caught:
            transport.all_to_all([b""])
        transport.commit(failure=caught.value)
        assert transport.form()
        assert transport.gather(b"a") == [b"a"]
        assert transport.commit()

    in_site(worker, settings(lighthouse, "a", min_replicas=1))


def test_replicas_that_are_not_alike_end_the_site(lighthouse):  # noqa: F811
    def worker(transport):
        transport.form()
        with pytest.raises(DivergedReplicasError, match=r"the replicas of site a are not alike: .* 1 would"):
            transport.gather(bytes([transport.place]))
        for again in (transport.form, lambda: transport.gather(b""), transport.stops):
            with pytest.raises(DivergedReplicasError):
                again()

    in_site(worker, settings(lighthouse, "a", min_replicas=1))


def test_a_lighthouse_that_cannot_be_reached_is_one_error_on_the_whole_site(free_port):
    def replica(_, make):
        with pytest.raises(ExchangeError, match="a cannot reach the lighthouse"):
            ElasticSiteTransport(settings(f"127.0.0.1:{free_port}", "a", timeout_s=0.5), inside=make())

    run_threads(replica, replicas=2)


def test_too_few_members_are_one_error_on_the_whole_site(lighthouse):  # noqa: F811
    def worker(transport):
        with pytest.raises(ExchangeError, match="a waited 1 s for other replicas"):
            transport.form()

    in_site(worker, settings(lighthouse, "a", patience_s=1))


def test_it_knows_what_it_is(lighthouse):  # noqa: F811
    def worker(transport):
        assert (transport.num_inside, transport.averages_inside, transport.is_leader) == (
            2,
            False,
            transport.place == 0,
        )
        assert transport.data_slice == (transport.place, 2)
        assert transport.called(0) == "replica a"
        transport.rank, transport.world_size, transport.sizes = 1, 3, [4, 2, 1]
        assert transport.data_slice == (4 + transport.place, 7)
        with pytest.raises(UsageError, match="it cannot be pickled"):
            pickle.dumps(transport)
        with pytest.raises(UsageError, match="no second channel"):
            transport.channel()

    in_site(worker, settings(lighthouse, "a"), averages=False)


def test_what_cannot_be_inside_a_site_is_refused(lighthouse):  # noqa: F811
    how = settings(lighthouse, "a")
    with pytest.raises(UsageError, match="inside a site there is a SingleReplica"):
        ElasticSiteTransport(how, inside=SingleReplica())
    member = ElasticTransport(how)
    try:
        with pytest.raises(UsageError, match="inside a site there is a ElasticTransport"):
            ElasticSiteTransport(how, inside=member)
    finally:
        member.close()


def test_replicas_that_give_another_averages_are_an_error_on_all(lighthouse):  # noqa: F811
    def replica(rank, make):
        with pytest.raises(ExchangeError, match="the site of replica"):
            ElasticSiteTransport(settings(lighthouse, "a"), inside=make(), averages=rank == 0)

    run_threads(replica, replicas=2)


def test_a_site_waits_longer_for_its_leader_than_that_one_for_others():
    how = ElasticSettings(lighthouse="a:1", timeout_s=60, join_s=600)
    assert longest_wait_s(how) > 2 * 600
    assert longest_wait_s(ElasticSettings(lighthouse="a:1", timeout_s=900, join_s=600)) > 2 * 900


@pytest.mark.parametrize("kind", [ExchangeError, DivergedReplicasError, UsageError])
def test_an_error_that_is_handed_on_stays_what_it_is(kind):
    with pytest.raises(kind, match="why"):
        raise_described(described(kind("why")))


def test_an_error_of_another_kind_is_handed_on_as_one_of_the_exchange():
    class OwnError(ExchangeError):
        pass

    with pytest.raises(ExchangeError, match="why"):
        raise_described(described(OwnError("why")))


def _meet(lighthouse, name, victim):  # noqa: F811
    """A site of processes: it synchronizes until the other one has come and gone, or a replica of it is gone."""
    os.environ["RUST_LOG"] = "error"
    how = settings(lighthouse, name, min_replicas=1)
    transport = ElasticSiteTransport(how, inside=ProcessGroupTransport())
    seen = []
    try:
        for _ in range(1000):
            transport.mean_inside([torch.ones(3)])
            if transport.place == victim and seen.count(("a", "b")) > 1:
                os._exit(1)
            try:
                transport.form()
                transport.gather(bytes(5000))
                transport.settle()
                transport.commit()
            except ReplicaLostError as error:
                transport.commit(failure=error)
                continue
            seen.append(transport.members)
            if seen[-1] == (name,) and len(seen) > 4 and ("a", "b") in seen:
                break
            time.sleep(0.02)
        return seen
    except ReplicaLostError as error:
        return error.rank, str(error)
    finally:
        transport.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_of_processes_one_is_killed_its_site_ends_at_once_and_the_other_goes_on(victim, lighthouse):  # noqa: F811
    began_s = time.monotonic()
    stays, goes = at_the_same_time(
        lambda: run_replicas(_meet, 2, lighthouse, "a", None),
        lambda: run_replicas(_meet, 2, lighthouse, "b", victim, expect_lost=(victim,)),
    )
    assert time.monotonic() - began_s < 60
    assert stays[0] == stays[1]
    assert ("a", "b") in stays[0]
    assert stays[0][-1] == ("a",)
    assert goes[victim] is None
    rank, text = goes[1 - victim]
    assert rank == victim
    assert re.search(rf"replica {1 - victim} of site b lost replica {victim} of its site in step 0 ", text)


def _waits_for_others(lighthouse):  # noqa: F811
    os.environ["RUST_LOG"] = "error"
    transport = ElasticSiteTransport(settings(lighthouse, "a"), inside=ProcessGroupTransport())
    if transport.place == 1:
        threading.Timer(1.0, lambda: os._exit(1)).start()
    began_s = time.monotonic()
    try:
        transport.form()
    except ReplicaLostError as error:
        return error.rank, time.monotonic() - began_s
    finally:
        transport.close()


def test_a_leader_that_waits_for_other_members_notices_that_it_lost_one_of_its_own(lighthouse):  # noqa: F811
    (lost, seconds), _ = run_replicas(_waits_for_others, 2, lighthouse, expect_lost=(1,))
    assert lost == 1
    assert seconds < 4
