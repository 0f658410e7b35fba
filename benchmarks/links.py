"""Links as they are: each thing that happens to a link, tried between hosts in network namespaces.

    sudo .venv/bin/python -m benchmarks.links --out evidence/links

A host is a namespace on one bridge and sends at 10 Mbit/s; each runs one replica, started by torchrun as docs/links.md shows. In
each trial something happens to the link or to a host while they train. What every host said since then, how the run ended and
when, and whether the weights are those of an undisturbed run go to one JSON file a trial.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from muonwire.compare.hosts import Host, hosts

from muonwire.train.status import read_status

SOURCE = Path(__file__).resolve().parents[1] / "src"
TRAIN = (
    *("--recipe", "one_bit_muon(interval=5)", "--model-size", "pico", "--sequence", "64", "--batch", "4"),
    *(
        "--evaluate-every",
        "1000",
        "--checkpoint-every",
        "50",
        "--digest-every",
        "50",
        "--no-tensorboard",
        "--no-page",
    ),
)
PORT = 29400
# Lines that torchrun's agent writes about its own work.
NOISE = re.compile(
    r"^\s*$|^[WE]\d{4} |^={5,}|^-{5,}|torch/distributed|^ *(raise|return|elastic_launch|run\(|main\(|File|self\.)"
)


class Replica:
    """One host's torchrun, and what it says, with the time."""

    def __init__(self, host: Host, words: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        env = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
        self.folder = folder
        self.lines: list[tuple[float, str]] = []
        self.ended_s: float | None = None
        self.process = host.start(
            words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip()))
        self.process.wait()
        self.ended_s = time.monotonic()

    def step(self) -> int:
        """Of its status."""
        try:
            return int(json.loads((self.folder / "run" / "status.json").read_text())["step"])
        except (OSError, ValueError, KeyError):
            return 0

    def signal(self, number: int) -> None:
        """Send a signal to the launcher and all that it started."""
        os.killpg(self.process.pid, number)
        # torchrun's workers have a session each.
        for pid in _children(self.process.pid):
            os.kill(pid, number)

    def join(self, within_s: float) -> None:
        """Wait for its end, or end it."""
        self._reader.join(within_s)
        if self._reader.is_alive():
            self.signal(signal.SIGKILL)
            self._reader.join(10)


def _children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(path.name), *_children(int(path.name))]
    return found


@dataclass
class Trial:
    """A run between hosts, to which something happens.

    Args:
        name: of its file.
        what: happens, in words.
        disturb: does it, once the run has begun.
        count: of hosts.
        timeout_s: ``--timeout-s`` of the run.
        steps: of the run.
        ends: "finished", or "error".
        prepare: is done to every host before.
    """

    name: str
    what: str
    disturb: Callable[["Running"], None]
    count: int = 2
    timeout_s: float = 600.0
    steps: int = 400
    ends: str = "finished"
    prepare: Callable[[Host], None] = lambda _: None


@dataclass
class Running:
    """A trial while it runs."""

    machines: list[Host]
    replicas: list[Replica]
    began_s: float = 0.0
    over_s: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def over(self) -> None:
        """The link is whole again from now on."""
        self.over_s = time.monotonic()
        self.notes["step_when_it_was_over"] = self.replicas[0].step()


def nothing(running: Running) -> None:
    running.over()


def rates(running: Running) -> None:
    for rate in ("1mbit", "200kbit", "50mbit"):
        for host in running.machines:
            host.limit(rate)
        time.sleep(8)
    running.over()


def losing(running: Running) -> None:
    for host in running.machines:
        host.lose(5)
    time.sleep(15)
    running.over()


def outage(seconds: float) -> Callable[[Running], None]:
    def disturb(running: Running) -> None:
        running.machines[-1].connect(False)
        time.sleep(seconds / 2)
        running.notes["status_half_way"] = [read_status(r.folder / "run").waiting for r in running.replicas]
        time.sleep(seconds / 2)
        running.machines[-1].connect(True)
        running.over()

    return disturb


def retry_within_5s(host: Host) -> None:
    """Let TCP try again at least every 5 s, where the kernel can be told (Linux 6.15)."""
    words = ["ip", "netns", "exec", host.namespace, "sysctl", "-q", "-w", "net.ipv4.tcp_rto_max_ms=5000"]
    subprocess.run(words, check=True)


def frozen(seconds: float) -> Callable[[Running], None]:
    def disturb(running: Running) -> None:
        running.replicas[-1].signal(signal.SIGSTOP)
        time.sleep(seconds)
        running.replicas[-1].signal(signal.SIGCONT)
        running.over()

    return disturb


def slow(running: Running) -> None:
    """The last replica computes a fifth of the time."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        running.replicas[-1].signal(signal.SIGSTOP)
        time.sleep(0.4)
        running.replicas[-1].signal(signal.SIGCONT)
        time.sleep(0.1)
    running.over()


def half_open(running: Running) -> None:
    """The last host's power fails: nobody hears that its connections end."""
    running.machines[-1].connect(False)
    running.replicas[-1].signal(signal.SIGKILL)


def rebooted(running: Running) -> None:
    """The same, but the host is back after 10 seconds and knows nothing of the connections."""
    half_open(running)
    time.sleep(10)
    running.machines[-1].connect(True)
    running.notes["host_was_back_after_s"] = 10


def readdressed(back_after_s: float | None) -> Callable[[Running], None]:
    def disturb(running: Running) -> None:
        host = running.machines[-1]
        host.readdress(host.address, "10.77.0.99")
        if back_after_s is not None:
            time.sleep(back_after_s)
            host.readdress("10.77.0.99", host.address)
            running.over()

    return disturb


def killed(running: Running) -> None:
    running.replicas[-1].signal(signal.SIGKILL)


TRIALS = (
    Trial("undisturbed", "nothing", nothing),
    Trial("undisturbed_three", "nothing", nothing, count=3),
    Trial("rate_changes", "10, 1, 0.2 and 50 Mbit/s, 8 s each", rates),
    Trial("loss", "from the middle on, 5 % of all packets get lost", losing),
    Trial("outage_30s", "the last host's cable is out for 30 s", outage(30)),
    Trial(
        "outage_30s_retry_5s",
        "the same, where TCP was told to try at least every 5 s: sysctl -w net.ipv4.tcp_rto_max_ms=5000",
        outage(30),
        prepare=retry_within_5s,
    ),
    Trial(
        "outage_beyond",
        "the last host's cable is out for longer than --timeout-s",
        outage(50),
        timeout_s=20,
        ends="error",
    ),
    Trial("frozen_20s", "the last host's processes stand still for 20 s (SIGSTOP)", frozen(20)),
    Trial("slow_replica", "the last of three replicas computes a fifth of the time, for 20 s", slow, count=3),
    Trial(
        "half_open",
        "the last host loses its power: no end of connection is heard",
        half_open,
        timeout_s=20,
        ends="error",
    ),
    Trial(
        "rebooted",
        "the last host loses its power and is back after 10 s without the run",
        rebooted,
        timeout_s=60,
        ends="error",
    ),
    Trial(
        "killed",
        "the last host's processes are killed; its system ends the connections",
        killed,
        ends="error",
    ),
    Trial(
        "address_back",
        "the last host's address changes, and is the old one again after 10 s",
        readdressed(10),
    ),
    Trial(
        "address_changed",
        "the last host's address changes for good",
        readdressed(None),
        timeout_s=20,
        ends="error",
    ),
)


def attempt(trial: Trial, folder: Path) -> dict[str, Any]:
    """Run a trial; returns its record."""
    with hosts(trial.count) as machines:
        assert machines[0].namespace, "the links need network namespaces: run as root on Linux"
        for host in machines:
            trial.prepare(host)
        replicas = [
            Replica(host, _command(trial, rank, machines[0].address), folder / f"host{rank}")
            for rank, host in enumerate(machines)
        ]
        running = Running(machines, replicas)
        try:
            _until(lambda: replicas[0].step() >= 20 or replicas[0].ended_s is not None, 120)
            assert replicas[0].ended_s is None, [line for _, line in replicas[0].lines]
            running.began_s = time.monotonic()
            running.notes["step_when_it_began"] = replicas[0].step()
            trial.disturb(running)
            recovered_s = _recovered(running) if trial.ends == "finished" else None
            for replica in replicas:
                replica.join(trial.timeout_s + 120)
        finally:
            for replica in replicas:
                replica.join(0)
    return _record(trial, running, recovered_s)


def _command(trial: Trial, rank: int, master: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--nnodes", str(trial.count), "--node-rank", str(rank)]
    torchrun += ["--master-addr", master, "--master-port", str(PORT), "--nproc-per-node", "1"]
    options = ["--steps", str(trial.steps), "--timeout-s", f"{trial.timeout_s:g}", "--out", "run"]
    return [sys.executable, *torchrun, "-m", "muonwire", "train", *TRAIN, *options]


def _until(met: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not met() and time.monotonic() < deadline:
        time.sleep(0.02)
    return met()


def _recovered(running: Running) -> float | None:
    """Seconds from the end of the disturbance until the first replica is a synchronization further."""
    if running.over_s is None:
        return None
    at = running.notes["step_when_it_was_over"]
    first = running.replicas[0]
    _until(lambda: first.step() > at + 5 or first.ended_s is not None, 300)
    return round(time.monotonic() - running.over_s, 1)


def _record(trial: Trial, running: Running, recovered_s: float | None) -> dict[str, Any]:
    sides = []
    for rank, replica in enumerate(running.replicas):
        said = [
            f"{at - running.began_s:.0f} s: {line[:400]}"
            for at, line in replica.lines
            if at >= running.began_s and not NOISE.search(line)
        ]
        trace = next((i for i, line in enumerate(said) if "Traceback (most recent call last)" in line), None)
        if trace is not None and any("error: " in line for line in said[:trace]):
            said[trace:] = [said[trace].partition(":")[0] + ": (torchrun's own report of the exit follows)"]
        ended_s = None if replica.ended_s is None else round(replica.ended_s - running.began_s, 1)
        side: dict[str, Any] = {
            "replica": rank,
            "exit_code": replica.process.returncode,
            "ended_after_s": ended_s,
            "said": said,
        }
        status = replica.folder / "run" / "status.json"
        if status.exists():
            record = json.loads(status.read_text())
            side |= {key: record[key] for key in ("outcome", "error", "step", "wait_s")}
        sides.append(side)
    result = running.replicas[0].folder / "run" / "result.json"
    digest = json.loads(result.read_text())["weights_digest"] if result.exists() else None
    words = _command(trial, 0, running.machines[0].address)[3:]
    return {
        "trial": trial.name,
        "what": trial.what,
        "command": "torchrun " + " ".join(f"'{word}'" if "(" in word else word for word in words),
        "hosts": trial.count,
        "timeout_s": trial.timeout_s,
        "expected": trial.ends,
        **running.notes,
        "recovered_after_s": recovered_s,
        "weights_digest": digest,
        "sides": sides,
        "machine": {"system": platform.platform(), "torch": torch.__version__, "cores": os.cpu_count()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("evidence/links"))
    parser.add_argument("--only", nargs="*", choices=[trial.name for trial in TRIALS])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for trial in TRIALS:
        if options.only and trial.name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            record = attempt(trial, Path(folder))
        (options.out / f"{trial.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        ends = [(side["exit_code"], side["ended_after_s"]) for side in record["sides"]]
        print(f"{trial.name}: {ends}, recovered after {record['recovered_after_s']} s", flush=True)


if __name__ == "__main__":
    main()
