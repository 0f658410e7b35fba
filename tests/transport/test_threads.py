"""Replicas as threads of one process: the same messages as between processes."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from benchmarks.standin import DEVICE, StandIn

from muonwire.errors import ReplicaLostError
from muonwire.transport import ProcessGroupTransport, check_replicas, frames, run_threads, threads
from tests.replicas import run_replicas


def _talk(transport):
    payloads = [
        transport.gather(bytes([transport.rank]) * (size + transport.rank)) for size in (3, 900, 901, 0)
    ]
    generator = torch.Generator().manual_seed(transport.rank)
    means = transport.mean([torch.randn(1000, generator=generator), torch.randn(3, generator=generator)])
    digest = check_replicas([("w", means[0])], transport)
    total = transport.meter.total
    return (
        payloads,
        means,
        digest,
        (total.sent_bytes, total.egress_bytes, total.received_bytes, total.num_messages),
    )


def _talk_in_a_process():
    return _talk(ProcessGroupTransport())


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_threads_exchange_what_processes_exchange_to_the_last_bit_and_byte(replicas):
    threads = run_threads(lambda _, transport: _talk(transport()), replicas=replicas)
    processes = run_replicas(_talk_in_a_process, replicas)
    for here, there in zip(threads, processes, strict=True):
        assert here[0] == there[0]
        assert all(torch.equal(a, b) for a, b in zip(here[1], there[1], strict=True))
        assert here[2:] == there[2:]


def test_the_replicas_take_turns():
    running, most = [], []

    def worker(_, make):
        transport = make()
        for _ in range(5):
            running.append(threading.get_ident())
            # Long enough for another thread to be scheduled, if it could run.
            time.sleep(0.001)
            most.append(len(running))
            running.pop()
            transport.gather(b"")

    run_threads(worker, replicas=3)
    assert max(most) == 1


def test_messages_of_two_exchanges_do_not_mix():
    def worker(rank, make):
        first, second = make(), make()
        return second.gather(b"second"), first.gather(b"first")

    assert run_threads(worker, replicas=2) == [([b"second"] * 2, [b"first"] * 2)] * 2


def test_a_replica_that_fails_ends_the_others_and_its_error_is_raised():
    ended = []

    def worker(rank, make):
        transport = make()
        transport.gather(b"")
        if rank == 1:
            raise KeyError("one fails")
        try:
            transport.gather(b"")
        except ReplicaLostError as error:
            ended.append((rank, error.rank))
            raise

    with pytest.raises(KeyError, match="one fails"):
        run_threads(worker, replicas=3)
    assert sorted(ended) == [(0, 1), (2, 1)]


def test_threads_compute_with_the_callers_number_of_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert run_threads(lambda _, transport: torch.get_num_threads(), replicas=2) == [1, 1]
    finally:
        torch.set_num_threads(before)


def test_one_replica_computes_for_all_and_each_is_counted_its_seconds(monkeypatch):
    # A clock that only the computation advances.
    computed, own_s = [], []
    clock = SimpleNamespace(perf_counter=lambda: 7.0 * len(computed))
    monkeypatch.setattr(threads, "time", clock)
    monkeypatch.setattr(frames, "time", clock)

    def compute():
        computed.append(object())
        return computed[-1]

    def worker(rank, make_transport):
        transport = make_transport()
        results = []
        for round_number in range(2):
            transport.gather(b"in step")
            before, start_s = transport.meter.training.wait_s, clock.perf_counter()
            results.append(transport.once(("round", round_number), compute))
            own_s.append(clock.perf_counter() - start_s - (transport.meter.training.wait_s - before))
        return results

    by_rank = run_threads(worker, replicas=3)
    assert len(computed) == 2
    assert own_s == [7.0] * 6
    assert all(results == by_rank[0] for results in by_rank)
    assert by_rank[0][0] is not by_rank[0][1]


def test_a_mean_takes_tensors_of_several_devices():
    """As of a model whose layers lie on two devices, and the shared scales beside a dense mean."""

    def talk(rank, make):
        with StandIn():
            there, here = torch.full((3,), float(rank)).to(DEVICE), torch.full((2,), 2.0 * rank)
            means = make().mean([there, here])
            return [(m.device.type, m.cpu().tolist()) for m in means]

    for found in run_threads(talk, replicas=2):
        assert found == [(DEVICE.type, [0.5] * 3), ("cpu", [1.0] * 2)]


def test_the_last_replica_to_come_to_a_meeting_works_for_all():
    done = []

    def worker(rank, make):
        transport = make()
        for turn in range(2):
            transport.meet((turn, rank), lambda brought: done.append((rank, brought)))
        return len(done)

    assert run_threads(worker, replicas=3) == [2, 2, 2]
    assert [brought for _, brought in done] == [[(turn, rank) for rank in range(3)] for turn in range(2)]


def test_a_replica_that_fails_ends_those_that_wait_at_a_meeting():
    ended = []

    def worker(rank, make):
        transport = make()
        if rank == 2:
            raise KeyError("one fails")
        try:
            transport.meet(None, lambda _: None)
        except ReplicaLostError as error:
            ended.append((rank, error.rank))
            raise

    with pytest.raises(KeyError, match="one fails"):
        run_threads(worker, replicas=3)
    assert sorted(ended) == [(0, 2), (1, 2)]


def test_each_replica_draws_the_random_numbers_of_a_process_of_its_own():
    def drawn(number):
        return [float(torch.rand(())) for _ in range(number)]

    def worker(rank, make):
        transport = make()
        numbers = drawn(1)
        if rank:
            torch.manual_seed(10 + rank)
        for _ in range(3):
            transport.gather(b"")
            numbers += drawn(2)
            transport.meet(None, lambda _: None)
        return numbers

    torch.manual_seed(5)
    first, *others = run_threads(worker, replicas=3)
    after = drawn(1)
    torch.manual_seed(5)
    assert [*first, *after] == drawn(8)
    for rank, numbers in enumerate(others, 1):
        torch.manual_seed(10 + rank)
        assert numbers == [first[0], *drawn(6)]
