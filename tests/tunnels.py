"""A WireGuard tunnel between hosts, made with the files and commands of docs/wireguard.md."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from muonwire.compare.hosts import Host, namespaces_allowed

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "wireguard" / "make_tunnel.py"
PROGRAMS = ("wg", "wg-quick", "wireguard-go")


def missing_for_tunnels() -> list[str]:
    """What this machine lacks to make a tunnel between namespaces."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if not namespaces_allowed():
        missing.append("network namespaces")
    if not Path("/dev/net/tun").exists():
        missing.append("/dev/net/tun")
    return missing


def make_files(words: Sequence[str | Path], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the script that makes keys and configurations."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@contextmanager
def tunnel(machines: Sequence[Host], folder: Path) -> Iterator[list[Host]]:
    """The same hosts with their addresses inside the tunnel."""
    names = [f"machine{i}" for i in range(len(machines))]
    ends = [f"{name}={machine.address}" for name, machine in zip(names, machines, strict=True)]
    listed = make_files([*ends, "--out", folder / "tunnel"]).stdout.splitlines()
    try:
        for name, machine in zip(names, machines, strict=True):
            # One machine has one folder of control sockets; here each host gets its own.
            up = "mkdir -p /run/wireguard && mount -t tmpfs tmpfs /run/wireguard && wg-quick up"
            command = f"{up} {folder / 'tunnel' / name / 'muonwire.conf'}"
            subprocess.run(
                ["ip", "netns", "exec", machine.namespace, "sh", "-c", command],
                check=True,
                capture_output=True,
            )
        yield [
            Host(address=line.split()[0], namespace=machine.namespace)
            for line, machine in zip(listed, machines, strict=True)
        ]
    finally:
        for machine in machines:
            # wireguard-go ends with its interface.
            subprocess.run(
                ["ip", "-n", machine.namespace, "link", "del", "muonwire"], capture_output=True, check=False
            )
