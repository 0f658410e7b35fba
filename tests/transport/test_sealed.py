"""Sealed links between real processes; benchmarks/attack_frames.py attacks a whole training run (tests/test_scripts.py)."""

import os
import pickle
import random
import signal
import socket
import struct
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muonwire.errors import ReplicaLostError, UsageError
from muonwire.transport import ProcessGroupTransport
from muonwire.transport import process_group as module
from muonwire.transport.sealed import SealedLinks
from muonwire.transport.secret import Secret
from tests.replicas import run_replicas

SECRET = bytes(range(32))
SIZES = (0, 10, 5000, 1000, (1 << 20) - 92, (1 << 20) - 91, 3 << 20)


def _operations():
    sent = 0
    real = dist.isend

    def spy(tensor, **kwargs):
        nonlocal sent
        sent += tensor.numel()
        return real(tensor, **kwargs)

    module.dist.isend = spy
    transport = ProcessGroupTransport(secret=Secret(SECRET), run="test")
    rank = transport.rank
    whole = [
        [theirs == bytes([r + 1]) * (size + r) for r, theirs in enumerate(transport.gather(own))]
        for size in SIZES
        for own in [bytes([rank + 1]) * (size + rank)]
    ]
    # Another transport of the same group goes on where this one stopped, without being told the secret again.
    again = pickle.loads(pickle.dumps(transport))
    mean = again.mean([torch.full((400_000,), float(rank)), torch.full((3,), rank, dtype=torch.float64)])
    transport.close()
    meters = [transport.meter.total, again.meter.total]
    return whole, [m.unique().tolist() for m in mean], sent, meters, transport.refused


@pytest.mark.parametrize("world_size", [2, 3])
def test_payloads_and_means_arrive_whole_and_the_meter_counts_the_tags(world_size):
    results = run_replicas(_operations, world_size)
    for rank, (whole, mean, sent, meters, refused) in enumerate(results):
        assert all(all(row) for row in whole)
        assert mean == [[(world_size - 1) / 2]] * 2
        assert sum(m.egress_bytes for m in meters) == sent
        assert refused == {peer: {} for peer in range(world_size) if peer != rank}
    received, egress = (
        sum(getattr(m, name) for result in results for m in result[3])
        for name in ("received_bytes", "egress_bytes")
    )
    assert received == egress


def _other_secret():
    own = bytes(range(dist.get_rank(), dist.get_rank() + 32))
    ProcessGroupTransport(secret=Secret(own)).gather(b"payload")


def test_replicas_with_different_secrets_end_with_one_error_on_both():
    for error in run_replicas(_other_secret, 2):
        assert error.kind == "ExchangeError"
        assert "none that is valid: give all replicas the same --secret-file" in str(error)


def _silent():
    transport = ProcessGroupTransport(secret=Secret(SECRET), timeout_s=1.0)
    transport.gather(b"all here")
    if transport.rank == 1:
        time.sleep(3)
        return None
    try:
        transport.gather(b"x")
    except Exception as error:
        return type(error).__name__, error.rank, str(error)


def test_a_silent_replica_is_named_when_its_time_is_over():
    kind, rank, text = run_replicas(_silent, 2)[0]
    assert (kind, rank) == ("ReplicaLostError", 1)
    assert "replica 0 lost replica 1 (of 2) in step 0: replica 1 did not answer in time (0 messages" in text


def _out_of_step():
    transport = ProcessGroupTransport(secret=Secret(SECRET))
    transport.gather(b"all here")
    transport.step = 7
    if transport.rank:
        transport.mean([torch.ones(500_000)])
    else:
        transport.gather(b"x")


def test_replicas_out_of_step_get_the_same_error_as_without_a_secret():
    errors = run_replicas(_out_of_step, 2)
    told = [str(error).splitlines()[0].removeprefix(f"replica {rank}: ") for rank, error in enumerate(errors)]
    assert told[0] == told[1]
    assert "replica 0 is in step 7 (gather), replica 1 in step 7 (mean)" in told[0]


def _killed():
    transport = ProcessGroupTransport(secret=Secret(SECRET))
    transport.gather(b"all here")
    if transport.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.perf_counter()
    try:
        transport.gather(b"x" * 1000)
    except Exception as error:
        time.sleep(0.5)
        return type(error).__name__, error.rank, str(error), time.perf_counter() - began


def test_a_killed_replica_is_named_by_the_others_within_seconds():
    results = run_replicas(_killed, 3, expect_lost=(1,))
    for rank in (0, 2):
        kind, lost, text, seconds = results[rank]
        assert (kind, lost) == ("ReplicaLostError", 1)
        assert text.startswith(f"replica {rank} of 3 lost its connection to replica 1 in step 0: ")
        assert seconds < 30


def _left_first():
    transport = ProcessGroupTransport(secret=Secret(SECRET))
    transport.gather(b"all here")
    if transport.rank == 1:
        transport._links.close(within_s=0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    began = time.perf_counter()
    transport.close()
    return time.perf_counter() - began


def test_a_peer_that_has_left_already_is_not_missed_at_the_end():
    assert run_replicas(_left_first, 2, expect_lost=(1,))[0] < 5


def _anew():
    """Two of three go on as another group, with other ranks, on a fresh process group."""
    transport = ProcessGroupTransport(secret=Secret(SECRET), run="test")
    rank = transport.rank
    transport.gather(b"three")
    group = dist.new_group([0, 2], timeout=timedelta(seconds=30))
    if rank == 1:
        return None
    transport.group = group
    transport.reset(rank=dist.get_rank(group), world_size=2, epoch=1)
    seen = transport.gather(bytes([rank]))
    transport.close()
    return seen, dict(transport.refused_in_all)


def test_a_group_formed_anew_has_streams_of_its_own():
    results = run_replicas(_anew, 3)
    assert results == [([b"\x00", b"\x02"], {}), None, ([b"\x00", b"\x02"], {})]


def _sealed_already():
    ProcessGroupTransport(secret=Secret(SECRET))
    try:
        ProcessGroupTransport(secret=Secret(SECRET[::-1]))
    except UsageError as error:
        return str(error)


def test_a_group_has_one_secret():
    assert "sealed with another secret" in run_replicas(_sealed_already, 1)[0]


def _listening_ports():
    """Of this process."""
    own = {f"socket:[{line.split()[9]}]": line.split() for line in _table() if line.split()[3] == "0A"}
    links = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))  # noqa: PTH115
        except OSError:
            continue
    return [int(own[link][1].split(":")[1], 16) for link in links if link in own]


def _table():
    return Path("/proc/self/net/tcp").read_text().splitlines()[1:]


def _under_a_flood_of_connections(count):
    transport = ProcessGroupTransport(secret=Secret(SECRET))
    transport.gather(b"all here")
    ports, chance, held, made = _listening_ports(), random.Random(0), [], []

    def attack():
        """gloo's listener reads a number of 8 bytes that says whose the connection is."""
        starts = [
            lambda: chance.randbytes(chance.randrange(1, 5000)),
            lambda: b"",
            lambda: b"GET / HTTP/1.1\r\n\r\n",
            lambda: struct.pack("<q", chance.randrange(-1, 6)),
            lambda: struct.pack("<q", chance.randrange(-1, 6)) + chance.randbytes(300),
            lambda: chance.randbytes(3),
        ]
        for number in range(count):
            stranger = socket.create_connection(("127.0.0.1", chance.choice(ports)), timeout=5)
            stranger.sendall(starts[number % 6]())
            if number % 100 == 1:
                held.append(stranger)
            else:
                stranger.close()
            made.append(number)

    thread = threading.Thread(target=attack)
    thread.start()
    good = []
    while True:
        busy = transport.gather(b"busy" if thread.is_alive() else b"done")
        good.append(transport.gather(bytes([transport.rank]) * 1000) == [bytes([r]) * 1000 for r in range(2)])
        if busy == [b"done"] * 2:
            break
    thread.join()
    transport.close()
    return len(ports), len(made), len(good), all(good)


def test_strangers_who_connect_to_the_open_port_do_not_disturb_the_run():
    for num_ports, made, operations, good in run_replicas(_under_a_flood_of_connections, 2, 1500):
        assert num_ports == 1
        assert made == 1500
        assert operations > 1
        assert good


@pytest.mark.parametrize("when", ["receiving", "sending"])
def test_a_peer_that_is_gone_when_a_link_begins_is_an_error_of_the_first_operation(when):
    gone = ReplicaLostError("replica 1 closed its connection", rank=1)

    def start(sends, peer, buffer):
        if sends == (when == "sending"):
            raise gone
        return buffer

    def wait(handle, limit):
        threading.Event().wait(0.2)
        raise gone

    links = SealedLinks(
        Secret(SECRET), run="", epoch=1, rank=0, world_size=2, start=start, wait=wait, notice=print
    )
    with pytest.raises(ReplicaLostError, match="replica 1 closed its connection"):
        links.take(1, time.monotonic() + 5)
    links.stop()
