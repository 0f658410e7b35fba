import os
import signal
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist

from muonwire.errors import UsageError
from muonwire.transport import Flag, ProcessGroupTransport, SingleReplica, check_agreement, check_replicas
from muonwire.transport import process_group as module
from muonwire.transport.frames import HEADER
from tests.replicas import run_replicas


def _gather():
    transport = ProcessGroupTransport()
    rank = transport.rank
    uneven = transport.gather(bytes([rank]) * (rank * 1000))
    empty = transport.gather(b"")
    same = transport.gather(b"abc")
    return uneven, empty, same


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gather_returns_payloads_of_different_sizes_in_rank_order(world_size):
    for uneven, empty, same in run_replicas(_gather, world_size):
        assert uneven == [bytes([r]) * (r * 1000) for r in range(world_size)]
        assert empty == [b""] * world_size
        assert same == [b"abc"] * world_size


def _inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    return [
        torch.randn(7, 3, generator=generator),
        torch.randn(5, generator=generator, dtype=torch.float64),
        torch.randn(11, generator=generator).to(torch.bfloat16),
        torch.randn(2, 2, generator=generator),
        torch.zeros(0),
    ]


def _mean():
    transport = ProcessGroupTransport()
    return transport.mean(_inputs(transport.rank))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_mean_is_the_sum_in_rank_order_to_the_last_bit(world_size):
    results = run_replicas(_mean, world_size)
    for i, first in enumerate(_inputs(0)):
        wide = torch.float32 if first.dtype == torch.bfloat16 else first.dtype
        total = first.to(wide)
        for rank in range(1, world_size):
            total = total + _inputs(rank)[i].to(wide)
        expected = (total / world_size).to(first.dtype)
        for result in results:
            assert result[i].dtype == first.dtype
            assert torch.equal(result[i], expected)


def _spied():
    handed = 0
    real = dist.isend

    def spy(tensor, **kwargs):
        nonlocal handed
        handed += tensor.numel() * tensor.element_size()
        return real(tensor, **kwargs)

    module.dist.isend = spy
    transport = ProcessGroupTransport()
    transport.gather(bytes(100 * transport.rank))
    transport.gather(bytes(200_000 * transport.rank))
    transport.mean([torch.randn(1000), torch.randn(3, dtype=torch.float64)])
    transport.mean([torch.randn(100_000)])
    check_replicas([("w", torch.ones(10))], transport)
    return handed, transport.meter.total


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_meter_counts_what_was_handed_to_the_process_group(world_size):
    results = run_replicas(_spied, world_size)
    for handed, traffic in results:
        assert traffic.egress_bytes == handed
    # What arrived is what the others sent: a buffer may be longer than its message.
    assert sum(t.egress_bytes for _, t in results) == sum(t.received_bytes for _, t in results)
    if world_size == 1:
        assert results[0][1].sent_bytes == 0


def _one_payload(num_bytes):
    transport = ProcessGroupTransport()
    transport.gather(bytes(num_bytes))
    return transport.meter.total


def test_a_payload_counts_once_as_sent_and_once_a_peer_as_egress():
    for traffic in run_replicas(_one_payload, 4, 1000):
        assert traffic.sent_bytes == 1000 + HEADER.size
        assert traffic.egress_bytes == 3 * traffic.sent_bytes
        assert traffic.received_bytes == 3 * traffic.sent_bytes


def _sizes_that_change():
    transport = ProcessGroupTransport()
    seen = []
    for size in (1000, 1003, 5000, 10, 0, 1000):
        own = bytes([transport.rank + 1]) * (size + transport.rank)
        everyone = transport.gather(own)
        seen.append([everyone[r] == bytes([r + 1]) * (size + r) for r in range(transport.world_size)])
    return seen, transport.meter.total.num_messages


def test_sizes_that_change_arrive_whole_and_steady_ones_take_one_message():
    for seen, messages in run_replicas(_sizes_that_change, 3):
        assert all(all(row) for row in seen)
        # The first, the much longer and the last take two messages.
        assert messages == 6 + 3


def _uneven_then_even():
    transport = ProcessGroupTransport()
    sent = []
    for size in (10, 5000, 10, 10):
        before = transport.meter.total.sent_bytes
        transport.gather(bytes(size if transport.rank == 0 else 10))
        sent.append(transport.meter.total.sent_bytes - before - HEADER.size)
    return sent


def test_a_frame_carries_no_padding_where_lengths_are_not_steady():
    owner, other = run_replicas(_uneven_then_even, 2)
    # An owner's long payload must cost neither the others nor the rounds after it.
    assert owner == [10, 5000, 10, 10]
    assert other == [10, 10, 10, 10]


def _one_mean(numel):
    transport = ProcessGroupTransport()
    transport.mean([torch.ones(numel)])
    return transport.meter.total


def test_a_dense_mean_sends_its_own_size_once():
    for traffic in run_replicas(_one_mean, 4, 4000):
        assert traffic.sent_bytes == 4 * 4000 + 4 * HEADER.size
        # Reduce and spread: the least that any mean of R replicas costs, 2 (R - 1) / R of the size.
        assert traffic.egress_bytes == 2 * 3 * (4000 + HEADER.size)


def _flags():
    transport = ProcessGroupTransport()
    agreed = []
    for operation in range(4):
        if transport.rank == 1 and operation == 1:
            transport.requested |= Flag.STOP
        if operation % 2:
            transport.gather(b"x")
        else:
            transport.mean([torch.ones(3)])
        agreed.append(transport.agreed)
    return agreed


def test_a_request_to_stop_is_agreed_after_the_same_operation_everywhere():
    for agreed in run_replicas(_flags, 3):
        assert agreed == [Flag.NONE, Flag.STOP, Flag.STOP, Flag.STOP]


def test_one_replica_alone_agrees_with_itself():
    transport = SingleReplica()
    transport.requested |= Flag.STOP
    transport.mean([torch.ones(1)])
    assert transport.agreed == Flag.STOP
    assert transport.meter.total.sent_bytes == 0


def _out_of_step():
    transport = ProcessGroupTransport()
    if transport.rank == 0:
        transport.gather(b"x")
    else:
        transport.gather(b"x")
        transport._sequence += 1
    transport.gather(b"y")


def test_replicas_that_fall_out_of_step_get_an_error():
    for error in run_replicas(_out_of_step, 2):
        assert error.kind == "ExchangeError"
        assert "out of step" in str(error)


def _different_settings():
    transport = ProcessGroupTransport()
    check_agreement("lr 0.1" if transport.rank == 2 else "lr 0.2", transport, what="settings")


def test_replicas_with_different_settings_are_named():
    for error in run_replicas(_different_settings, 3):
        assert error.kind == "ExchangeError"
        assert "settings of replica(s) 2" in str(error)


def _digest(change_on):
    transport = ProcessGroupTransport()
    named = [("first", torch.zeros(4)), ("second.weight", torch.ones(3, 2)), ("third", torch.ones(1))]
    if transport.rank == change_on:
        named[1][1][2, 1] = 1 + 2**-23
        named[2][1][0] = 5
    return check_replicas(named, transport), transport.meter.total.sent_bytes


def test_the_digest_names_the_first_parameter_and_the_rank_that_differs():
    agreeing = run_replicas(_digest, 3, None)
    assert len({digest for digest, _ in agreeing}) == 1
    assert all(sent == 8 + HEADER.size for _, sent in agreeing)
    for error in run_replicas(_digest, 3, 2):
        assert error.kind == "DivergedReplicasError"
        assert "'second.weight'" in str(error)
        assert "rank(s) 2 " in str(error)


def _killed():
    transport = ProcessGroupTransport()
    transport.gather(b"all here")
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start_s = time.perf_counter()
    try:
        transport.gather(b"x" * 1000)
    except Exception as error:
        time.sleep(0.5)
        return type(error).__name__, error.rank, str(error), time.perf_counter() - start_s
    return None


def test_a_killed_replica_is_named_by_the_others_within_seconds():
    results = run_replicas(_killed, 3, expect_lost=(1,))
    for result in (results[0], results[2]):
        kind, rank, message, seconds = result
        assert (kind, rank) == ("ReplicaLostError", 1)
        assert "replica 1" in message
        assert seconds < 30


def test_without_a_process_group_there_is_a_clear_error():
    with pytest.raises(UsageError, match="not initialized"):
        ProcessGroupTransport()


def _socket_bytes():
    """What the kernel has delivered to this process's TCP connections: `tcpi_bytes_received` of struct tcp_info, linux/tcp.h."""
    total = 0
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (
                socket.AF_INET,
                socket.AF_INET6,
            ):
                information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += int.from_bytes(information[128:136], sys.byteorder)
    return total


def _run_of(mean_numel, payload_bytes, count):
    transport = ProcessGroupTransport()
    transport.gather(b"ready")
    # Messages are awaited ahead: nobody sends before all have looked.
    dist.barrier()
    before = _socket_bytes()
    dist.barrier()
    for step in range(count):
        if mean_numel:
            transport.mean([torch.ones(mean_numel)])
        transport.gather(bytes(payload_bytes + step % 7))
    transport.gather(b"done")
    dist.barrier()
    return _socket_bytes() - before, transport.meter.total


@pytest.mark.skipif(sys.platform != "linux", reason="struct tcp_info is Linux's")
@pytest.mark.parametrize(("mean_numel", "payload_bytes", "count"), [(500_000, 300_000, 10), (0, 9_000, 300)])
def test_the_kernel_counts_what_the_meter_counts(mean_numel, payload_bytes, count):
    """The rest is gloo's own headers and handshakes; other processes' traffic is not in it."""
    results = run_replicas(_run_of, 4, mean_numel, payload_bytes, count)
    for kernel, traffic in results:
        assert 1.0 <= kernel / traffic.received_bytes <= 1.02
