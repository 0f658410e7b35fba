"""Hosts in network namespaces: their rates and delays, and that nothing of them stays behind. Times are bounded from below only."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from muonwire.compare import hosts as module
from muonwire.compare.hosts import Host, has_netem, hosts, lacking, namespaces_allowed, replica_environment
from muonwire.compare.measured import Counters
from muonwire.errors import UsageError
from muonwire.transport import Link

needs_namespaces = pytest.mark.skipif(not namespaces_allowed(), reason=f"hosts need namespaces: {lacking()}")

# Waits for one connection, answers its first byte, and says how long all the bytes took that it was told to expect.
TAKE = """
import socket, sys, time
size = int(sys.argv[1])
server = socket.create_server(("0.0.0.0", 5000))
print("ready", flush=True)
connection, _ = server.accept()
connection.sendall(connection.recv(1))
began, got = time.perf_counter(), 0
while got < size:
    got += len(connection.recv(1 << 20))
print(time.perf_counter() - began)
"""
# Says how long the answer to one byte takes, and sends.
SEND = """
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 5000))
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
began = time.perf_counter()
connection.sendall(b"x")
connection.recv(1)
print(time.perf_counter() - began)
connection.sendall(bytes(int(sys.argv[2])))
"""


def send(sender, taker, size):
    """The round trip, and how long ``size`` bytes take."""
    options = {"stdout": subprocess.PIPE}
    taking = taker.start([sys.executable, "-c", TAKE, str(size)], **options)
    taking.stdout.readline()
    sending = sender.start([sys.executable, "-c", SEND, taker.address, str(size)], **options)
    trip_s, took_s = float(sending.communicate(timeout=60)[0]), float(taking.communicate(timeout=60)[0])
    return trip_s, took_s


def test_a_replica_s_environment_is_what_torchrun_would_say(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    monkeypatch.setenv("KEPT", "yes")
    made = [Host(address=f"10.77.0.{i + 1}") for i in range(3)]
    env = replica_environment(made, 2, port=29400)
    assert "GLOO_SOCKET_IFNAME" not in env
    told = (
        "KEPT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
    )
    assert [env[name] for name in told] == ["yes", "2", "3", "0", "1", "10.77.0.1", "29400", "1"]


@needs_namespaces
def test_a_link_has_its_rates_both_ways_and_its_delay():
    link = Link.parse("2mbit:8mbit/30ms")
    with hosts(3, link=link) as made:
        size = 200_000
        trip_s, took_s = send(made[0], made[1], size)
        assert trip_s >= 2 * 0.030 - 0.002
        # A bucket and what is in flight may pass at once.
        assert took_s >= 0.9 * size * 8 / 2e6
        before = Counters.read()
        # Two that send at 2 Mbit/s each do not fill the 8 that a third receives at; at 1 Mbit/s down they do.
        down = ["tc", "-n", f"{made[0].namespace[:-2]}s", "qdisc", "replace", "dev", "p1", "root"]
        subprocess.run([*down, *module._bucket(1.0)], check=True)
        _, slower_s = send(made[0], made[1], size)
        assert slower_s >= 0.9 * size * 8 / 1e6
        # These are of this process's own network, which has no such interface.
        assert before == Counters.read() == Counters()


@needs_namespaces
def test_a_short_message_does_not_pass_a_slow_link_at_the_speed_of_the_machine():
    with hosts(2, link=Link.parse("1mbit")) as made:
        _, took_s = send(made[0], made[1], 20_000)
    assert took_s >= 0.8 * 20_000 * 8 / 1e6


@needs_namespaces
def test_the_kernel_counts_what_is_sent_without_headers():
    with hosts(2, link=Link.parse("100mbit")) as made:
        send(made[0], made[1], 300_000)
        with ThreadPoolExecutor(1, initializer=made[0].enter) as there:
            counted = there.submit(Counters.read).result()
    assert counted.egress_bytes == pytest.approx(300_001, rel=0.005)
    assert counted.received_bytes < 3000
    assert 0 < counted.egress_packets <= 300


@needs_namespaces
def test_nothing_stays_behind():
    with hosts(2, link=Link.parse("10mbit/5ms")) as made:
        group = made[0].namespace[:-2]
        assert group in namespaces()
        assert (module._LOCKS / f"{group}.lock").read_text().strip() == str(os.getpid())
    assert group not in namespaces()
    assert not (module._LOCKS / f"{group}.lock").exists()


@needs_namespaces
def test_what_a_killed_process_left_is_removed_by_the_next_one():
    holder, told = start_holder()
    namespace, pid = told.split()
    with hosts(1):
        assert namespace in namespaces(), "the hosts of one that lives stay"
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert namespace in namespaces()
    with hosts(1):
        assert namespace not in namespaces()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "what ran on the hosts goes on"
        time.sleep(0.05)


def start_holder():
    """A process that has hosts, with something running on one, until it is killed; its number, and what it says of them."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with hosts(2, link=Link.parse("10mbit/5ms")) as made:
            left = made[1].start(["sleep", "1000"])
            os.write(write, f"{made[0].namespace} {left.pid}\n".encode())
            signal.pause()
    os.close(write)
    with os.fdopen(read) as told:
        return pid, told.readline()


def namespaces():
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def test_where_the_kernel_delays_it_is_told_to(monkeypatch):
    told = []
    monkeypatch.setattr(module, "_run", lambda *words: told.append(" ".join(words)))
    host = Host(address="10.0.0.1", namespace="mwah0")
    module._shape(host, "mwas", "p0", Link.parse("20mbit:200mbit/40ms"), delay=True)
    assert told == [
        "tc -n mwah0 qdisc replace dev wan0 root handle 1: netem delay 40000us limit 100000",
        "tc -n mwah0 qdisc replace dev wan0 parent 1:1 handle 2: tbf rate 20000kbit burst 5000b latency 400ms",
        "tc -n mwas qdisc replace dev p0 root tbf rate 200000kbit burst 50000b latency 400ms",
    ]


@needs_namespaces
def test_a_delay_without_netem_and_without_tun_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "has_netem", lambda: False)
    broken = tmp_path / "relay.py"
    broken.write_text("raise SystemExit('no /dev/net/tun')")
    monkeypatch.setattr(module, "_RELAY", broken)
    before = namespaces()
    with (
        pytest.raises(UsageError, match=r"no /dev/net/tun; leave the latency out of the link"),
        hosts(2, link=Link.parse("10mbit/5ms")),
    ):
        pass
    assert set(namespaces().split()) <= set(before.split())


@needs_namespaces
def test_whether_the_kernel_has_netem_is_tried():
    before = namespaces()
    assert has_netem() in (True, False)
    assert "mwtry" not in namespaces().replace(before, "")


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (("os.geteuid", lambda: 1000), "only root"),
        (("shutil.which", lambda name: None), "`ip` is missing"),
        (("sys.platform", "darwin"), "Linux's"),
    ],
)
def test_what_is_lacking_is_named(monkeypatch, patch, says):
    name, value = patch
    monkeypatch.setattr(f"muonwire.compare.hosts.{name}", value)
    if name != "shutil.which":
        monkeypatch.setattr("muonwire.compare.hosts.shutil.which", lambda name: name)
    assert says in lacking()
    assert not namespaces_allowed()
