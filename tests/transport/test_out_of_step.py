"""Replicas that are not in lockstep: one error on all of them, no abort, no hang, and none later."""

import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from muonwire.errors import ExchangeError, ReplicaLostError
from muonwire.transport import Flag, ProcessGroupTransport, run_threads
from muonwire.transport.header import GATHER, HEADER, REDUCE, Header, checksum
from tests.commands import context
from tests.replicas import run_replicas


def _mean(*shapes, dtype=torch.float32):
    return lambda t: t.mean([torch.ones(shape, dtype=dtype) for shape in shapes])


def _gather(num_bytes, purpose="update"):
    return lambda t: t.gather(bytes(num_bytes), purpose=purpose)


def _all_to_all(num_bytes, purpose="update"):
    return lambda t: t.all_to_all([bytes(num_bytes)] * t.world_size, purpose=purpose)


def _in_step(step, operation):
    def run(transport):
        transport.step = step
        operation(transport)

    return run


def _ahead(operation):
    def run(transport):
        transport._sequence += 1
        operation(transport)

    return run


# What all replicas but the last do, what the last one does, and what the error says of each.
CASES = {
    "mean and gather": (_mean(250_000), _gather(8), "step 0 (mean)", "step 0 (gather)"),
    "gather and mean": (_gather(8), _mean(2_500_000), "step 0 (gather)", "step 0 (mean)"),
    "steps and operations": (
        _in_step(4, _mean(250_000)),
        _in_step(5, _gather(8)),
        "step 4 (mean)",
        "step 5 (gather)",
    ),
    "steps of gathers": (
        _in_step(4, _gather(8)),
        _in_step(2, _gather(8)),
        "step 4 (gather)",
        "step 2 (gather)",
    ),
    "steps of means": (_in_step(7, _mean(9)), _in_step(8, _mean(9)), "step 7 (mean)", "step 8 (mean)"),
    "small sizes": (_mean(1000), _mean(36), "(mean, in parts of", "(mean, in parts of"),
    "large sizes": (_mean(3_000_000), _mean(1_000_000), "(mean, in parts of", "(mean, in parts of"),
    "dtypes": (_mean(12), _mean(6, dtype=torch.float64), "checksum of shapes", "checksum of shapes"),
    "halves": (
        _mean(600, dtype=torch.float16),
        _mean(600, dtype=torch.bfloat16),
        "checksum of shapes",
        "checksum of shapes",
    ),
    "numbers of tensors": (_mean(10, 10), _mean(20), "checksum of shapes", "checksum of shapes"),
    "dtypes beside the first": (
        lambda t: t.mean([torch.ones(4), torch.ones(4, dtype=torch.float64)]),
        _mean(4),
        "checksum of shapes",
        "checksum of shapes",
    ),
    "shapes": (_mean((2, 10)), _mean((10, 2)), "checksum of shapes", "checksum of shapes"),
    "nothing to average": (_mean(), _mean(20), "(mean, in parts of 0 bytes)", "(mean, in parts of"),
    "purposes": (
        _gather(2_000_000),
        _gather(2_000_000, "control"),
        "gather for 'update'",
        "gather for 'control'",
    ),
    "fresh purposes": (
        _gather(8, "one"),
        _gather(8, "two"),
        "step 0 (gather for",
        "step 0 (gather for",
    ),
    "all-to-all and gather": (
        _all_to_all(8),
        _gather(8),
        "step 0 (all-to-all)",
        "step 0 (gather)",
    ),
    "mean and all-to-all": (
        _mean(250_000),
        _all_to_all(2_000_000),
        "step 0 (mean)",
        "step 0 (all-to-all)",
    ),
    "purposes of an all-to-all": (
        _all_to_all(8),
        _all_to_all(9, "control"),
        "all-to-all for 'update'",
        "all-to-all for 'control'",
    ),
    "sequences": (_gather(8), _ahead(_gather(8)), "operation 4 modulo", "operation 5 modulo"),
}


def _caught(operation):
    start_s = time.perf_counter()
    try:
        operation()
    except ExchangeError as error:
        return type(error).__name__, str(error), time.perf_counter() - start_s
    return None


def _mismatch(transport, case):
    for _ in range(2):
        # The last of these leaves "update" with a long first message, and "control" with a short one.
        transport.gather(bytes(2_000_000))
    transport.gather(b"", purpose="control")
    transport._sequence = 3
    most, last, _, _ = CASES[case]
    first = _caught(lambda: (last if transport.rank == transport.world_size - 1 else most)(transport))
    later = [_caught(lambda: transport.gather(b"")), _caught(lambda: transport.mean([torch.ones(2)]))]
    return first, later


def _mismatch_in_a_process(case, has_tags):
    transport = ProcessGroupTransport()
    transport._has_tags = has_tags
    return _mismatch(transport, case)


def _check(results, case):
    world_size = len(results)
    _, _, said_of_most, said_of_last = CASES[case]
    for (kind, text, seconds), later in results:
        assert kind == "ExchangeError"
        assert seconds < 10
        assert f"replica {world_size - 1} in " in text
        most, last = text.split(f"replica {world_size - 1} in ")
        assert ("replica 0 is" if world_size == 2 else "replicas 0 and 1 are") in most
        assert said_of_most in most
        assert said_of_last in last
        for again in later:
            assert again[0] == "ExchangeError"
            assert again[1].startswith("this transport failed before and cannot be used again: replicas ")
            assert again[2] < 5
    if "Replica" not in results[0][0][1] and case != "fresh purposes":
        assert len({text for (_, text, _), _ in results}) == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_processes_get_one_error_that_names_who_differs(case, world_size):
    _check(run_replicas(_mismatch_in_a_process, world_size, case, True), case)


@pytest.mark.parametrize("case", CASES)
def test_headers_that_travel_before_the_bodies_find_it_too(case):
    _check(run_replicas(_mismatch_in_a_process, 2, case, False), case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_threads_get_the_same_error(case, world_size):
    results = run_threads(lambda _, make: _mismatch(make(), case), replicas=world_size)
    _check(results, case)


def _leave(rank, path, destroy):
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    transport = ProcessGroupTransport()
    try:
        # Both leave a long body on its way, and a buffer that waits for one.
        _mean(3_000_000 if rank else 1_000_000)(transport)
    except ExchangeError:
        del transport
        if destroy:
            dist.destroy_process_group()
        return
    sys.exit(3)


@pytest.mark.parametrize("destroy", [True, False])
def test_a_process_that_catches_the_error_ends_normally(destroy):
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "store")
        processes = [context.Process(target=_leave, args=(rank, path, destroy)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=30)
        assert [process.exitcode for process in processes] == [0, 0]


def _late(delay_s):
    transport = ProcessGroupTransport()
    if transport.rank == 0:
        time.sleep(delay_s)
        return _caught(lambda: transport.mean([torch.ones(1_000_000)]))
    return _caught(lambda: transport.gather(b"x"))


def test_a_replica_that_comes_late_finds_the_errors_cause_and_not_a_lost_replica():
    for kind, text, _ in run_replicas(_late, 3, 0.5):
        assert kind == "ExchangeError"
        assert "replica 0 is in step 0 (mean), replicas 1 and 2 in step 0 (gather)" in text


def _loses_replica_1(rank, make):
    transport = make()
    transport.gather(b"")
    if rank == 1:
        raise KeyError("gone")
    errors = []
    for _ in range(2):
        with pytest.raises(ReplicaLostError) as caught:
            transport.gather(b"")
        errors.append((str(caught.value), caught.value.rank))
    lost.append(errors)


lost = []


def test_after_a_lost_replica_every_operation_says_so():
    lost.clear()
    with pytest.raises(KeyError):
        run_threads(_loses_replica_1, replicas=3)
    assert len(lost) == 2
    for (_, first_rank), (again, again_rank) in lost:
        assert (first_rank, again_rank) == (1, 1)
        assert "failed before" in again


def _many_sizes():
    transport = ProcessGroupTransport()
    rank, right = transport.rank, []
    for step, numel in enumerate([0, 1, 1 << 17, (1 << 18) - 4, 1 << 18, (1 << 18) + 1, 700_001, 5]):
        transport.step = (1 << 32) - 4 + step
        (mean,) = transport.mean([torch.full((numel,), float(rank))])
        everyone = transport.gather(bytes([rank]) * numel)
        again = transport.gather(bytes([rank]) * numel)
        right.append(
            bool((mean == 1).all())
            and everyone == again == [bytes([r]) * numel for r in range(transport.world_size)]
        )
    return right


def test_messages_about_as_long_as_the_shared_buffer_arrive_whole():
    for right in run_replicas(_many_sizes, 3):
        assert all(right)


def _headers_first():
    transport = ProcessGroupTransport()
    transport._has_tags = False
    transport.requested |= Flag.CHANGED if transport.rank else Flag.NONE
    payloads = transport.gather(bytes(5 * transport.rank))
    (mean,) = transport.mean([torch.full((1000,), float(transport.rank))])
    traffic = transport.meter.total
    return payloads, mean[0].item(), transport.agreed, traffic.egress_bytes, traffic.received_bytes


def test_headers_first_sends_the_same_bytes():
    for rank, (payloads, mean, agreed, egress, received) in enumerate(run_replicas(_headers_first, 2)):
        assert payloads == [b"", bytes(5)]
        assert mean == 0.5
        assert agreed == Flag.CHANGED
        means = 2 * (HEADER.size + 2000)
        assert egress == HEADER.size + 5 * rank + means
        assert received == HEADER.size + 5 * (1 - rank) + means


@pytest.mark.parametrize("kind", [GATHER, REDUCE])
@pytest.mark.parametrize("flags", [Flag.NONE, Flag.CHANGED, Flag.STOP | Flag.DIVERGED | Flag.CHANGED])
def test_a_header_is_sixteen_bytes_and_comes_back_as_it_was(kind, flags):
    header = Header(kind, flags, (1 << 32) - 1, 255, 65535, (1 << 40) - 1)
    assert len(header.pack()) == HEADER.size == 16
    assert Header.unpack(header.pack(), rank=0) == header


@pytest.mark.parametrize("data", [b"XM" + bytes(14), b"MX\x01" + bytes(13)])
def test_what_is_no_header_of_this_version_is_refused(data):
    with pytest.raises(ExchangeError, match=r"replica 7 .* same muonwire"):
        Header.unpack(data, rank=7)


def test_the_usual_purposes_have_different_checksums():
    assert len({checksum(purpose) for purpose in ("update", "digest", "control")}) == 3
