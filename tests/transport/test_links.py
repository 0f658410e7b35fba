"""Links as they are: what happens to a link ends in a message and a recovery, or in one clear error in the stated time."""

import re
import signal
import time

from muonwire.compare.hosts import hosts, namespaces_allowed
from muonwire.transport import Link
from tests.transport.test_rendezvous import end, start

# Gathers until its time is over, with a watcher that speaks early, and says at the end how much was exchanged.
EXCHANGE = """
import sys, time
from muonwire.errors import ExchangeError
from muonwire.transport import Flag, ProcessGroupTransport, watching
from muonwire.transport.rendezvous import join
lasts_s, timeout_s, num_bytes = map(float, sys.argv[1:])
join(backend="gloo", timeout_s=timeout_s)
transport = ProcessGroupTransport()
transport.waits.limit_s = timeout_s
say = lambda line: print(line, flush=True)
with watching(transport.waits, say=say, first_s=1.0):
    until = time.monotonic() + lasts_s
    try:
        while Flag.STOP not in transport.agreed:
            if time.monotonic() > until:
                transport.requested |= Flag.STOP
            for rank, payload in enumerate(transport.gather(bytes([transport.rank]) * int(num_bytes))):
                assert payload == bytes([rank]) * int(num_bytes)
            if transport.meter.total.num_messages < 3:
                say("exchanging")
            time.sleep(0.01)
    except ExchangeError as error:
        say(f"error: {error}")
        sys.exit(1)
say(f"done: {dict(transport.meter.wait_s)}")
"""


class Pair:
    """Two or three hosts that exchange, and what each said."""

    def __init__(self, machines, folder, port, *, lasts_s, timeout_s=60.0, num_bytes=1000):
        self.machines = machines
        self.folders = [folder / f"host{rank}" for rank in range(len(machines))]
        words = ["-c", EXCHANGE, str(lasts_s), str(timeout_s), str(num_bytes)]
        self.processes = []
        for rank, host in enumerate(machines):
            self.folders[rank].mkdir()
            self.processes.append(
                start(
                    host,
                    words,
                    rank=rank,
                    world_size=len(machines),
                    master=machines[0].address,
                    port=port,
                    folder=self.folders[rank],
                )
            )
        self._until(lambda: all("exchanging" in self.said(rank) for rank in range(len(machines))), 60)

    def said(self, rank):
        return (self.folders[rank] / f"replica{rank}.log").read_text()

    @staticmethod
    def _until(met, within_s):
        deadline = time.monotonic() + within_s
        while not met():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def interrupt(self, seconds):
        """The last host is cut off for some time; where there are no namespaces, its process stands still instead."""
        if namespaces_allowed():
            self.machines[-1].connect(False)
            time.sleep(seconds)
            self.machines[-1].connect(True)
        else:
            print("no namespaces: the process stands still, and the link is whole")
            self.processes[-1].send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.processes[-1].send_signal(signal.SIGCONT)

    def vanish(self):
        """The last host loses its power, so that nobody hears of it; without namespaces its process stands still for good."""
        if namespaces_allowed():
            self.machines[-1].connect(False)
            self.processes[-1].kill()
        else:
            self.processes[-1].send_signal(signal.SIGSTOP)


def called(machines, rank):
    """As messages name it: with its address, unless that is of the loopback interface."""
    return f"replica {rank} ({machines[rank].address})" if namespaces_allowed() else f"replica {rank}"


def test_an_outage_ends_in_messages_and_a_recovery(tmp_path, free_port):
    with hosts(2) as machines:
        pair = Pair(machines, tmp_path, free_port, lasts_s=2)
        pair.interrupt(5)
        assert end(pair.processes, 60) == [0, 0]
        names = [called(machines, rank) for rank in range(2)]
    # One that stands still knows of no wait.
    for rank in range(2 if namespaces_allowed() else 1):
        said, other = pair.said(rank), names[1 - rank]
        assert re.search(rf"^waiting for {re.escape(other)} for \d s \(at most 60 s\)$", said, re.M), said
        answered = re.search(rf"^{re.escape(other)} answered after (\d+) s$", said, re.M)
        assert answered, said
        assert 4 <= int(answered[1]) < 40
        waited_s = float(re.search(rf"done: {{'{1 - rank}': ([\d.]+)}}", said)[1])
        assert waited_s >= int(answered[1]) - 1


def test_a_host_that_vanishes_is_one_error_in_the_stated_time(tmp_path, free_port):
    with hosts(3) as machines:
        trio = Pair(machines, tmp_path, free_port, lasts_s=60, timeout_s=3)
        began_s = time.monotonic()
        trio.vanish()
        codes = end(trio.processes[:2], 30)
        took_s = time.monotonic() - began_s
        trio.processes[2].kill()
        missing = called(machines, 2)
    assert codes == [1, 1]
    assert took_s < 3 + 12
    for rank in range(2):
        said = trio.said(rank)
        assert f"waiting for {missing} for " in said, said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in said
    # The one whose time is over first says why; the other hears of that one's end, or ran out of time itself.
    assert f"s for {missing} in step 0 and got no answer" in trio.said(0) + trio.said(1)


def test_an_address_that_changes_is_one_error_in_the_stated_time_on_both(tmp_path, free_port):
    with hosts(2) as machines:
        pair = Pair(machines, tmp_path, free_port, lasts_s=60, timeout_s=3)
        began_s = time.monotonic()
        if namespaces_allowed():
            machines[1].readdress(machines[1].address, "10.77.0.99")
        else:
            print("no namespaces: the process stands still, and its address stays")
            pair.processes[1].send_signal(signal.SIGSTOP)
        codes = end(pair.processes[: 2 if namespaces_allowed() else 1], 30)
        took_s = time.monotonic() - began_s
        pair.processes[1].kill()
        other = called(machines, 1)
    assert codes == [1] * len(codes)
    assert took_s < 3 + 12
    assert re.search(rf"error: replica 0 of 2 waited \d s for {re.escape(other)} in step", pair.said(0)), (
        pair.said(0)
    )


def test_a_rate_that_changes_changes_nothing_else(tmp_path, free_port):
    with hosts(2) as machines:
        pair = Pair(machines, tmp_path, free_port, lasts_s=4, num_bytes=100_000)
        for rate in ("200kbit", "50mbit") if namespaces_allowed() else ():
            for host in machines:
                host.limit(rate)
            time.sleep(2)
        assert end(pair.processes, 60) == [0, 0]
    if namespaces_allowed():
        # 100 kB take 4 s at 0.2 Mbit/s.
        assert "waiting for replica 1 (10.77.0.2) for 1 s (at most 60 s)" in pair.said(0), pair.said(0)
        assert "replica 1 (10.77.0.2) answered after" in pair.said(0)


# Gathers twice at the same moments on both hosts, and says how long the shortest two took.
REST_AND_GATHER = """
import time
from muonwire.transport import ProcessGroupTransport
from muonwire.transport.rendezvous import join
join(backend="gloo", timeout_s=60.0)
transport, others = ProcessGroupTransport(), ProcessGroupTransport()
seconds = []
for i in range(7):
    # Transports of one group take turns.
    used = (transport, others)[i % 2]
    time.sleep(0.5 - time.time() % 0.5)
    began = time.perf_counter()
    for number in (i, 100 + i):
        assert used.gather(bytes([transport.rank, number])) == [bytes([0, number]), bytes([1, number])]
    seconds.append(time.perf_counter() - began)
print(f"shortest: {min(seconds[1:])} s", flush=True)
"""


def test_two_messages_after_a_rest_take_a_delay_of_the_link_each_and_not_two(tmp_path, free_port):
    delay_s = 0.1 if namespaces_allowed() else 0.0
    if not delay_s:
        print("no namespaces: the link has no delay")
    link = Link(rate_mbit_s=100, latency_s=delay_s)
    with hosts(2, link=link if delay_s else None) as machines:
        folders = [tmp_path / f"host{rank}" for rank in range(2)]
        processes = []
        for rank, host in enumerate(machines):
            folders[rank].mkdir()
            place = {"master": machines[0].address, "port": free_port, "folder": folders[rank]}
            processes.append(start(host, ["-c", REST_AND_GATHER], rank=rank, world_size=2, **place))
        assert end(processes, 60) == [0, 0]
    for rank in range(2):
        said = (folders[rank] / f"replica{rank}.log").read_text()
        shortest_s = float(re.search(r"^shortest: (\S+) s$", said, re.M)[1])
        assert 2 * delay_s <= shortest_s + 0.05
        # Three delays, if only the first of the two were awaited before it is due.
        assert shortest_s < 2.5 * max(delay_s, 0.1)
