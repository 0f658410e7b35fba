"""A second channel: in order, by a thread of its own, beside the messages of the first."""

import threading

import pytest
import torch
import torch.distributed as dist

from muonwire.errors import ExchangeError, UsageError
from muonwire.transport import ProcessGroupTransport, Secret, SingleReplica
from muonwire.transport.channel import Channel
from tests.lockstep import lockstep
from tests.replicas import run_replicas


def _beside(secret):
    transport = ProcessGroupTransport(secret=Secret(bytes(range(32))) if secret else None, run="test")
    channel, rank = transport.channel(), transport.rank
    other, meanwhile = channel.transport, threading.Event()

    def act():
        # Under way while the first transport is used.
        assert meanwhile.wait(30)
        other.step = 7
        return other.gather(bytes([rank]) * (5 + rank))

    first, second = channel.start(act), channel.start(lambda: other.mean([torch.full((2,), float(rank))])[0])
    transport.step = 3
    main = transport.gather(b"m%d" % rank)
    before = first.done
    meanwhile.set()
    found = first.result(), main, second.result().tolist(), before
    traffic = first.traffic["update"], second.traffic["update"], transport.meter.total
    names = threading.current_thread().name, threading.active_count() > 1
    transport.gather(b"", purpose="control")
    transport.close()
    return found, traffic, names, transport.refused_in_all.total()


@pytest.mark.parametrize("secret", [False, True])
def test_messages_of_both_travel_beside_one_another(secret):
    for found, (gathered, averaged, main), names, refused in run_replicas(_beside, 2, secret):
        assert found == ([b"\0" * 5, b"\1" * 6], [b"m0", b"m1"], [0.5, 0.5], False)
        # The traffic is that of each thing done, and not of the first transport.
        assert (gathered.num_messages, averaged.num_messages) == (2, 2)
        assert main.num_messages == 2
        assert names == ("MainThread", True)
        assert refused == 0


def _of_pairs():
    """Replicas 0 and 1, and 2 and 3: each pair makes its own channel, of which the other pair knows nothing."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    transport = ProcessGroupTransport(pairs[rank // 2])
    channel = transport.channel()
    other = channel.transport
    return channel.start(lambda: other.gather(bytes([rank]))).result(), other.called(1 - other.rank)


def test_a_group_of_some_replicas_has_a_channel_of_these():
    results = [r for r, _ in run_replicas(_of_pairs, 4)]
    assert results == [[b"\0", b"\1"]] * 2 + [[b"\2", b"\3"]] * 2


def _out_of_step():
    transport = ProcessGroupTransport()
    channel = transport.channel()
    other = channel.transport

    def act():
        other.step = 4 + transport.rank
        return other.gather(b"")

    works = [channel.start(act), channel.start(act)]
    errors = []
    for work in works:
        with pytest.raises(ExchangeError) as error:
            work.result()
        errors.append(str(error.value))
    # The first transport is as it was.
    return errors, transport.gather(b"x")


def test_an_error_is_that_of_the_thing_that_failed_and_leaves_the_first_transport_alone():
    for errors, gathered in run_replicas(_out_of_step, 2):
        assert "replica 0 is in step 4 (gather), replica 1 in step 5 (gather)" in errors[0]
        assert "this transport failed before" in errors[1]
        assert gathered == [b"x", b"x"]


def test_replicas_that_take_turns_do_everything_at_once():
    def replica(transport):
        first, second = transport.channel(), transport.channel()
        assert first.at_once
        works = [c.start(lambda c=c: c.transport.gather(bytes([transport.rank]))) for c in (second, first)]
        assert all(work.done for work in works)
        return [work.result() for work in works], transport.gather(b"m")

    assert lockstep(replica, 2) == [([[b"\0", b"\1"]] * 2, [b"m", b"m"])] * 2


def test_a_replica_alone_does_everything_at_once():
    channel = SingleReplica().channel()
    assert channel.start(lambda: channel.transport.gather(b"a")).result() == [b"a"]
    with pytest.raises(ZeroDivisionError):
        channel.start(lambda: 1 // 0).result()


def test_the_thread_computes_with_as_many_threads_as_the_replica_and_ends_with_its_channel():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        channel = Channel(SingleReplica())
        assert channel.start(torch.get_num_threads).result() == 1
        thread = channel._thread
        assert thread.daemon
        assert channel.start(threading.current_thread).result() is thread
    finally:
        torch.set_num_threads(before)
    del channel
    thread.join(10)
    assert not thread.is_alive()


def test_elastic_replicas_have_none():
    from muonwire.transport.elastic import ElasticTransport

    with pytest.raises(UsageError, match="have no second channel; step with Elastic"):
        ElasticTransport.channel(None)
