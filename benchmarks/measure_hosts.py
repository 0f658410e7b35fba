"""What emulated links carry: rate both ways, round trip, and the relay's share of a core, between hosts in network namespaces.

    sudo .venv/bin/python -m benchmarks.measure_hosts --out evidence/emulate/hosts.json

For each link four hosts each send to the next one at the same time. The rate is that of the bytes that arrive after the first
quarter, so without TCP's start; Ethernet, IP and TCP take 4.4 % of a link in packets of 1,514 bytes. The round trip is that of a
datagram of one byte on the idle link. A message is a gather of 1 kB between two replicas over gloo, right after another one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from muonwire.compare.hosts import Host, has_netem, hosts, lacking
from muonwire.transport import Link

LINKS = ("10mbit/40ms", "100mbit/40ms", "20mbit:200mbit/40ms", "200mbit/40ms", "100mbit/5ms", "10mbit")
HOSTS = 4
PORT = 5000

ECHO = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", {PORT}))
print("ready", flush=True)
while True:
    data, address = s.recvfrom(100)
    s.sendto(data, address)
"""
PING = f"""
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
s.connect((sys.argv[1], {PORT}))
for i in range(31):
    began_s = time.perf_counter()
    s.send(b"x")
    s.recv(100)
    if i:  # the first asks for the address
        print(1e3 * (time.perf_counter() - began_s))
"""
TAKE = f"""
import socket, sys, time
size = int(sys.argv[1])
server = socket.create_server(("0.0.0.0", {PORT}))
print("ready", flush=True)
s, _ = server.accept()
got, begun = 0, None
while got < size:
    got += len(s.recv(1 << 20))
    if begun is None and got >= size // 4:
        begun = time.perf_counter(), got
print(8e-6 * (got - begun[1]) / (time.perf_counter() - begun[0]))
"""
SEND = f"""
import socket, sys
s = socket.create_connection((sys.argv[1], {PORT}))
s.sendall(bytes(int(sys.argv[2])))
"""
GATHER = """
import time
from muonwire.transport import ProcessGroupTransport
from muonwire.transport.rendezvous import join
join(backend="gloo")
transport = ProcessGroupTransport()
for i in range(14):
    began_s = time.perf_counter()
    transport.gather(bytes(1000))
    if i >= 4 and transport.rank == 0:
        print(1e3 * (time.perf_counter() - began_s))
"""


def start(host: Host, program: str, *words: str, **variables: str) -> "subprocess.Popen[str]":
    # An interface of this machine is none of the host's.
    held = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    return host.start(
        [sys.executable, "-c", program, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**held, **variables},
    )


def lines(process: "subprocess.Popen[str]") -> list[float]:
    """The numbers that a program prints before it ends."""
    said, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"measure_hosts: a host's program ended with {process.returncode}: {errors[-1500:]}")
    return [float(line) for line in said.splitlines() if line[:1].isdigit()]


def ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    process.stdout.readline()


def relay_s() -> float:
    """Processor time of the relay that this process has started; 0 without one."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_text()
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if "relay.py" in words and int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(link: Link, seconds: float) -> dict[str, Any]:
    with hosts(HOSTS, link=link) as made:
        echo = start(made[1], ECHO)
        ready(echo)
        trips = lines(start(made[0], PING, made[1].address))
        echo.kill()
        size = int(min(link.rate_mbit_s, link.received_mbit_s) * 1e6 / 8 * seconds)
        takers = [start(host, TAKE, str(size)) for host in made]
        for taker in takers:
            ready(taker)
        before_s = relay_s()
        senders = [start(made[i], SEND, made[(i + 1) % HOSTS].address, str(size)) for i in range(HOSTS)]
        rates = [lines(taker)[0] for taker in takers]
        for sender in senders:
            sender.wait()
        used_s = relay_s() - before_s
        place = {"MASTER_ADDR": made[0].address, "MASTER_PORT": "29400", "WORLD_SIZE": "2"}
        replicas = [start(made[rank], GATHER, RANK=str(rank), **place) for rank in range(2)]
        gathers, _ = (lines(replica) for replica in replicas)
    return {
        "link": str(link),
        "mbit_s": [round(rate, 2) for rate in rates],
        "round_trip_ms": {
            "least": round(min(trips), 2),
            "median": round(median(trips), 2),
            "most": round(max(trips), 2),
        },
        "relay_share_of_a_core": round(used_s / seconds, 2),
        "gather_of_1_kb_ms": round(median(gathers), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--links", nargs="+", default=list(LINKS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of sending")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if lacking():
        sys.exit(f"no link can be emulated here: {lacking()}")
    rows = []
    for text in options.links:
        rows.append(measure(Link.parse(text), options.seconds))
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        machine = {"system": platform.platform(), "cores": os.cpu_count()}
        congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        delay = "netem" if has_netem() else "relay"
        record = {
            "hosts": HOSTS,
            "delay_by": delay,
            "congestion_control": congestion,
            "machine": machine,
            "rows": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
