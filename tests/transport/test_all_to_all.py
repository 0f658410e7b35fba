"""A payload of one's own for each replica: what arrives, what is counted, and what goes wrong."""

import pytest
import torch

from muonwire.errors import ExchangeError, ReplicaLostError, UsageError
from muonwire.transport import ProcessGroupTransport, SingleReplica, frames, run_threads
from muonwire.transport.frames import LENGTH_BYTES
from muonwire.transport.header import HEADER
from muonwire.transport.secret import Secret
from tests.replicas import run_replicas

HEAD_BYTES = HEADER.size + LENGTH_BYTES
# Of each round: what sender i gives receiver j, in bytes.
ROUNDS = [
    lambda i, j: 10 * i + j,
    lambda i, j: 10 * i + j,
    lambda i, j: 10 * i + j,
    lambda i, j: 400 * (i + 1) * (j + 2) + 7,
    lambda i, j: 0,
    lambda i, j: 1_100_000 if (i, j) == (0, 1) else 3,
]


def content(i, j, count):
    return bytes((17 * i + 5 * j + k) % 251 for k in range(min(count, 251))) * (count // 251 + 1)


def payload(i, j, count):
    return content(i, j, count)[:count]


def talk(transport):
    """Whether each round's payloads are right, and its traffic."""
    rank, world_size, found = transport.rank, transport.world_size, []
    for size in ROUNDS:
        before = transport.meter.total
        received = transport.all_to_all([payload(rank, j, size(rank, j)) for j in range(world_size)])
        spent = transport.meter.total - before
        found.append(
            (
                received == [payload(i, rank, size(i, rank)) for i in range(world_size)],
                (spent.sent_bytes, spent.egress_bytes, spent.received_bytes, spent.num_messages),
            )
        )
    return found


def talk_in_a_process(has_tags, sealed):
    transport = ProcessGroupTransport(secret=Secret(bytes(range(32))) if sealed else None)
    transport._has_tags = has_tags
    found = talk(transport)
    transport.close()
    return found


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_each_gets_what_was_meant_for_it(replicas):
    for found in run_threads(lambda _, make: talk(make()), replicas=replicas):
        assert all(right for right, _ in found)


def test_every_byte_is_counted_and_steady_lengths_take_one_message():
    by_rank = run_threads(lambda _, make: talk(make()), replicas=3)
    for rank, found in enumerate(by_rank):
        for number, (_, (sent, egress, received, messages)) in enumerate(found[:3]):
            peers = [r for r in range(3) if r != rank]
            assert sent == egress == sum(HEAD_BYTES + ROUNDS[number](rank, j) for j in peers)
            assert received == sum(HEAD_BYTES + ROUNDS[number](i, rank) for i in peers)
            assert messages == (2 if number == 0 else 1)


@pytest.mark.parametrize(("has_tags", "sealed"), [(True, False), (False, False), (True, True)])
def test_processes_exchange_the_same(has_tags, sealed):
    threads = run_threads(lambda _, make: talk(make()), replicas=3)
    processes = run_replicas(talk_in_a_process, 3, has_tags, sealed)
    for here, there in zip(threads, processes, strict=True):
        assert all(right for right, _ in there)
        if not sealed:
            assert here == there


def test_lengths_that_change_a_little_fit_into_one_message():
    def worker(rank, make):
        transport, messages = make(), []
        for length in (1000, 1003, 999, 1006, 1001):
            before = transport.meter.total
            transport.all_to_all([bytes(length)] * 2)
            messages.append((transport.meter.total - before).num_messages)
        return messages

    assert run_threads(worker, replicas=2) == [[2, 2, 1, 1, 1]] * 2


def test_one_that_observes_is_sent_to_and_brings_nothing():
    def worker(rank, make):
        transport = make()
        transport.observes = rank == 1
        received = transport.all_to_all([bytes([rank, j]) for j in range(3)])
        means = transport.gather(bytes([rank]), observers=True)
        return received, means, transport.gather(bytes([rank]))

    for rank, (received, means, updates) in enumerate(run_threads(worker, replicas=3)):
        assert received == [bytes([0, rank]), bytes([2, rank])]
        assert means == [b"\x00", b"\x01", b"\x02"]
        assert updates == [b"\x00", b"\x02"]


def test_where_all_observe_all_get_an_error():
    def worker(rank, make):
        transport = make()
        transport.observes = True
        with pytest.raises(ExchangeError, match="all 2 replicas observe"):
            transport.all_to_all([b"", b""])

    run_threads(worker, replicas=2)


@pytest.mark.parametrize("transport", [SingleReplica(), None])
def test_one_payload_for_each(transport):
    def worker(rank, make):
        with pytest.raises(UsageError, match=r"1 payloads for 2 replicas"):
            make().all_to_all([b"x"])

    if transport is None:
        run_threads(worker, replicas=2)
    else:
        assert transport.all_to_all([b"x"]) == [b"x"]
        with pytest.raises(UsageError, match=r"2 payloads for 1 replicas"):
            transport.all_to_all([b"x", b"y"])


def test_a_payload_that_is_too_long_is_an_error_on_all(monkeypatch):
    monkeypatch.setattr(frames, "LARGEST_PAYLOAD_BYTES", 100)
    errors = []

    def worker(rank, make):
        with pytest.raises(
            ExchangeError, match=r"all-to-all: the payload of replica 1 has 101 bytes"
        ) as caught:
            make().all_to_all([bytes(101 if (rank, j) == (1, 0) else 3) for j in range(3)])
        errors.append(str(caught.value))

    run_threads(worker, replicas=3)
    assert len(set(errors)) == 1
    assert len(errors) == 3


def test_a_length_beyond_the_header_is_refused_before_anything_is_allocated():
    def worker(rank, make):
        transport = make()
        if rank == 1:
            to_wire = transport._to_wire

            def forged(data):
                # The length in front of the payload, whose header says 3.
                return to_wire((1 << 39).to_bytes(LENGTH_BYTES, "little") + data[LENGTH_BYTES:])

            transport._to_wire = forged
            transport.all_to_all([b"abc", b"abc"])
            return
        with pytest.raises(ExchangeError, match=r"replica 1 announces 549755813888 bytes, and at most 3"):
            transport.all_to_all([b"abc", b"abc"])

    with pytest.raises(ReplicaLostError):
        # Replica 0 has ended, and its peer waits for the rest.
        run_threads(lambda rank, make: _fails_after(worker, rank, make), replicas=2)


def _fails_after(worker, rank, make):
    worker(rank, make)
    if rank == 0:
        raise ReplicaLostError("done")


def test_many_threads():
    count = 16

    def worker(rank, make):
        transport = make()
        return [transport.all_to_all([bytes([rank, j]) * (j + 1) for j in range(count)]) for _ in range(3)]

    for rank, rounds in enumerate(run_threads(worker, replicas=count)):
        assert all(received == [bytes([i, rank]) * (rank + 1) for i in range(count)] for received in rounds)


def test_a_failed_one_ends_the_transport():
    def worker(rank, make):
        transport = make()
        transport.step = rank
        with pytest.raises(ExchangeError, match=r"step 0 \(all-to-all\), replica 1 in step 1 \(all-to-all\)"):
            transport.all_to_all([b"", b""])
        with pytest.raises(ExchangeError, match="failed before"):
            transport.mean([torch.ones(1)])

    run_threads(worker, replicas=2)
