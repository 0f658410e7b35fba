"""What a secret and a WireGuard tunnel cost: the rate between two hosts, and processor time per gigabyte.

    python benchmarks/measure_tunnel.py --out evidence/tunnel.json

Two hosts are network namespaces on one bridge; each replica sends random bytes to the other at the same time, through the same
transport as in training. The rate is that of each direction. Processor time is that of both replicas, and of both wireguard-go,
user and system, for each gigabyte that one of them sends. What is measured takes turns, and the medians are kept. Needs root.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# By the link's rate in Mbit/s, 0 where it has none: bytes of a message, and how often it is sent.
SIZES = {0: (64_000_000, 3), 100: (12_000_000, 2), 10: (2_500_000, 1)}
WAYS = ("plain", "secret", "tunnel", "tunnel and secret")
PORT = 29461
SECRET = bytes(range(64, 96))


def work(num_bytes: int, rounds: int, secret: bool) -> None:
    """One replica: prints what it measured as JSON."""
    import torch.distributed as dist

    from muonwire.transport import ProcessGroupTransport
    from muonwire.transport.rendezvous import join
    from muonwire.transport.secret import Secret

    held = Secret(SECRET) if secret else None
    interface = join(backend="gloo", secret=held, allow_public=True)
    transport = ProcessGroupTransport(secret=held)
    payload = os.urandom(num_bytes)
    for _ in range(2):
        transport.gather(payload[: 1 << 16])
    began, processor_s = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        transport.gather(payload)
    seconds, processor_s = time.perf_counter() - began, time.process_time() - processor_s
    transport.close()
    print(json.dumps({"seconds": seconds, "processor_s": processor_s, "interface": interface.name}))
    dist.destroy_process_group()


def measure(machines: list[Any], way: str, num_bytes: int, rounds: int) -> dict[str, float]:
    """One exchange between two hosts."""
    from muonwire.compare.hosts import replica_environment

    before = tunnel_s(machines)
    replicas = []
    for rank, machine in enumerate(machines):
        env = replica_environment(machines, rank, port=PORT)
        words = [sys.executable, __file__, "--worker", num_bytes, rounds, int("secret" in way)]
        replicas.append(machine.start(words, env=env, stdout=subprocess.PIPE))
    said = [replica.communicate()[0] for replica in replicas]
    if any(replica.returncode for replica in replicas):
        raise SystemExit(f"{way}: the replicas ended with {[r.returncode for r in replicas]}")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    gigabytes = 2 * num_bytes * rounds / 1e9
    return {
        "mbit_s": num_bytes * rounds * 8e-6 / max(one["seconds"] for one in found),
        "replicas_s_per_gb": sum(one["processor_s"] for one in found) / gigabytes,
        "wireguard_s_per_gb": (tunnel_s(machines) - before) / gigabytes,
    }


def tunnel_s(machines: list[Any]) -> float:
    """Processor seconds that the hosts' wireguard-go have taken so far."""
    total = 0.0
    for machine in machines:
        if not machine.namespace:
            continue
        listed = subprocess.run(
            ["ip", "netns", "pids", machine.namespace], capture_output=True, text=True, check=True
        )
        for number in listed.stdout.split():
            place = Path("/proc") / number
            if place.exists() and (place / "comm").read_text().startswith("wireguard-go"):
                fields = (place / "stat").read_text().rsplit(")", 1)[1].split()
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=int, nargs="+", default=list(SIZES), help="Mbit/s; 0: no limit")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bytes", type=int, help="of each message; default: a few seconds' worth")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        num_bytes, rounds, secret = arguments.worker
        work(num_bytes, rounds, bool(secret))
        return
    from tests.tunnels import missing_for_tunnels, tunnel

    from muonwire.compare.hosts import hosts

    missing = missing_for_tunnels()
    ways = [way for way in arguments.ways if not ("tunnel" in way and missing)]
    if missing:
        print(f"no tunnel is measured, for want of {', '.join(missing)}")
    rows = []
    for rate in arguments.rates:
        num_bytes, rounds = SIZES.get(rate, SIZES[10])
        num_bytes = arguments.bytes or num_bytes
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            machines = stack.enter_context(hosts(2, rate=f"{rate}mbit" if rate else ""))
            inside = (
                stack.enter_context(tunnel(machines, Path(folder)))
                if any("tunnel" in way for way in ways)
                else []
            )
            for _ in range(arguments.repeats):
                for way in ways:
                    found[way].append(
                        measure(inside if "tunnel" in way else machines, way, num_bytes, rounds)
                    )
        for way, measured in found.items():
            medians = {key: round(statistics.median(one[key] for one in measured), 3) for key in measured[0]}
            spread = [round(pick(one["mbit_s"] for one in measured), 1) for pick in (min, max)]
            rows.append({"link_mbit_s": rate or None, "way": way, **medians, "mbit_s_from_to": spread})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        report = {"repeats": arguments.repeats, "cores": os.cpu_count(), "rows": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
