"""For whom a transport waits: counted by peer, and said where it takes long."""

import time

import pytest

from muonwire.transport import Meter, ProcessGroupTransport, Waits, watching
from muonwire.transport import waiting as module
from muonwire.transport.waiting import LONG_S
from tests.replicas import run_replicas


@pytest.fixture
def waits():
    return Waits(Meter(), limit_s=600)


def watched(waits, *, first_s=0.1):
    said, shown = [], []
    return said, shown, watching(waits, say=said.append, show=shown.append, first_s=first_s)


def test_a_long_wait_is_said_and_shown_until_its_end(waits):
    said, shown, watcher = watched(waits)
    with watcher:
        with waits.on("replica 2 (10.77.0.3)", peer="2"):
            time.sleep(0.4)
        time.sleep(0.15)
    assert said[0] == "waiting for replica 2 (10.77.0.3) for 0 s (at most 600 s)"
    assert said[1:] == ["replica 2 (10.77.0.3) answered after 0 s"]
    assert shown[0] == said[0]
    assert shown[-1] == ""
    assert 0.4 <= waits.meter.wait_s["2"] < 5


def test_a_wait_that_ends_with_the_block_is_said_too(waits):
    said, shown, watcher = watched(waits, first_s=0.2)
    with watcher, waits.on("replica 1", peer="1"):
        time.sleep(0.35)
    assert said[-1] == "replica 1 answered after 0 s"
    assert shown[-1] == ""


def test_a_short_wait_is_counted_and_not_said(waits):
    said, shown, watcher = watched(waits, first_s=2.0)
    with watcher:
        for _ in range(20):
            with waits.on("replica 1", peer="1"):
                time.sleep(0.005)
    assert said == shown == []
    assert waits.meter.wait_s["1"] >= 0.1
    assert not waits.long


def test_what_is_waited_for_may_change_and_has_its_own_end(waits):
    there = [1]
    said, _, watcher = watched(waits)
    waits.limit_s = None
    with watcher:
        with waits.on(lambda: f"replicas ({there[0]} of at least 3 are there)", answer="all 3 were there"):
            time.sleep(0.25)
            there[0] = 2
            assert waits.text() == "waiting for replicas (2 of at least 3 are there) for 0 s"
        time.sleep(0.15)
    assert said == ["waiting for replicas (1 of at least 3 are there) for 0 s", "all 3 were there after 0 s"]
    assert waits.meter.wait_s == {}


def test_a_wait_that_fails_is_no_answer(waits):
    said, shown, watcher = watched(waits)

    def fails():
        with waits.on("replica 1", peer="1"):
            time.sleep(0.3)
            raise RuntimeError

    with watcher:
        with pytest.raises(RuntimeError):
            fails()
        time.sleep(0.15)
    assert len(said) == 1
    assert shown[-1] == ""
    assert waits.current is None
    assert waits.meter.wait_s["1"] >= 0.3
    assert not waits.long


def test_waits_nest_and_long_ones_are_kept_for_events(waits, monkeypatch):
    monkeypatch.setattr(module, "LONG_S", 0.05)
    assert LONG_S == 1.0
    with waits.on("the group"):
        with waits.on("replica 1", peer="1") as inner:
            assert waits.current is inner
            time.sleep(0.06)
        assert waits.text().startswith("waiting for the group for")
    assert [(wait.peer, wait.text()) for wait in waits.long] == [("1", "replica 1"), ("", "the group")]
    assert waits.long[0].seconds >= 0.06


def test_the_clock_is_read_twice_for_a_wait(waits, monkeypatch):
    read = []
    clock = time.perf_counter
    monkeypatch.setattr(module.time, "perf_counter", lambda: read.append(1) or clock())
    for _ in range(10):
        with waits.on("replica 1", peer="1"):
            pass
    assert len(read) == 20


def _late(late, seconds):
    """Gathers, the ``late`` replicas only after some seconds; what replica 0's watcher said."""
    transport = ProcessGroupTransport()
    said = []
    transport.gather(b"ready")
    if transport.rank in late:
        time.sleep(seconds)
    with watching(transport.waits, say=said.append, first_s=0.2):
        transport.gather(b"late")
        time.sleep(0.2)
    return said, transport.meter.wait_s, transport.meter.total.wait_s


@pytest.mark.parametrize(("late", "named"), [((2,), "replica 2"), ((1, 2), "replica 1 and replica 2")])
def test_those_whose_message_is_missing_are_named(late, named):
    results = run_replicas(_late, 3, late, 0.8)
    said, wait_s, in_exchanges = results[0]
    assert said[0] == f"waiting for {named} for 0 s"
    # Replicas that come together may be seen one after the other.
    assert said[-1] == f"replica {late[-1]} answered after 1 s" or said[1] == "replica 1 answered after 1 s"
    # The others are not blamed, and all waits lie within the exchanges.
    assert wait_s[str(late[0])] >= 0.5
    assert sum(wait_s.values()) <= in_exchanges
    assert sum(seconds for name, seconds in wait_s.items() if int(name) not in late) < 0.4
    assert results[2][0] == []
