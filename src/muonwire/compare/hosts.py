"""Hosts with nothing shared but a link: network namespaces on one bridge, or loopback addresses where those are not allowed.

Each host has one interface, wan0. Its rate up is a token bucket (tbf) at that interface, its rate down one at the switch's port of
that host. The delay is netem's at the host's interface where the kernel has it; elsewhere the cable between host and switch is a
small program, ``relay.py``, that holds every frame for so long.
"""

import ctypes
import fcntl
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from muonwire.errors import UsageError
from muonwire.transport.link import Link

INTERFACE = "wan0"
# A bucket holds what the rate brings in so long, or one packet, so that short messages do not pass it at the machine's speed.
BURST_S = 0.002
_PACKET_BYTES = 1600
# What a port keeps before it drops packets.
_QUEUE_MS = 400
_NETEM_PACKETS = 100_000
_RELAY = Path(__file__).with_name("relay.py")
_RELAY_STARTS_S = 20.0
# A lock for each group of hosts, held as long as its owner lives.
_LOCKS = Path("/run/muonwire")
_CLONE_NEWNET = 0x40000000


def ip(*words: str) -> None:
    """Run the ``ip`` command."""
    _run("ip", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"hosts: `{' '.join(words)}` failed: {done.stderr.strip()}")


def _bucket(rate_mbit_s: float) -> list[str]:
    """A token bucket of this rate, in the words of ``tc``."""
    burst_bytes = max(int(rate_mbit_s * 1e6 / 8 * BURST_S), _PACKET_BYTES)
    return [
        "tbf",
        "rate",
        f"{rate_mbit_s * 1e3:.0f}kbit",
        "burst",
        f"{burst_bytes}b",
        "latency",
        f"{_QUEUE_MS}ms",
    ]


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine.

    Args:
        address: on the link.
        namespace: its network; empty where the hosts share this machine's loopback.
    """

    address: str
    namespace: str = ""

    def start(self, command: Sequence[str | Path], **options: object) -> subprocess.Popen[str]:
        """Start a command on this host, in a process group of its own."""
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        words = [*inside, *(str(word) for word in command)]
        return subprocess.Popen(words, text=True, start_new_session=True, **options)  # type: ignore[call-overload,no-any-return]

    def enter(self) -> None:
        """Move this thread, and all that it starts from now on, to this host."""
        if not self.namespace:
            return
        with Path("/run/netns", self.namespace).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, f"hosts: {self.namespace} cannot be entered: {os.strerror(code)}")

    def limit(self, rate: str) -> None:
        """Change the rate at which this host sends, such as "1mbit"."""
        words = ["tc", "-n", self.namespace, "qdisc", "replace", "dev", INTERFACE, "root"]
        _run(*words, *_bucket(Link.parse(rate).rate_mbit_s))

    def lose(self, percent: int) -> None:
        """From now on so many of a hundred packets that reach this host get lost; needs nft."""
        rules = "add table inet lossy\nadd chain inet lossy input { type filter hook input priority 0; }\n"
        rules += "flush chain inet lossy input\n"
        rules += f"add rule inet lossy input numgen random mod 100 < {percent} drop\n" if percent else ""
        words = ["ip", "netns", "exec", self.namespace, "nft", "-f", "-"]
        subprocess.run(words, input=rules, text=True, check=True, capture_output=True)

    def connect(self, up: bool) -> None:
        """Plug the host's cable in or out: at the switch, so that the host itself sees its interface as it was."""
        switch, _, number = self.namespace.rpartition("h")
        ip("-n", f"{switch}s", "link", "set", f"p{number}", *(["master", "br0"] if up else ["nomaster"]))

    def readdress(self, old: str, new: str) -> None:
        """Take one address from the host and give it another, as a router does that leases addresses."""
        ip("-n", self.namespace, "addr", "del", f"{old}/24", "dev", INTERFACE)
        ip("-n", self.namespace, "addr", "add", f"{new}/24", "dev", INTERFACE)


def replica_environment(made: Sequence[Host], rank: int, *, port: int) -> dict[str, str]:
    """This process's environment for a replica of one thread on host ``rank``, with what torchrun would say of one replica a host.

    Args:
        made: the hosts, of which the first is the master.
        rank: of the replica.
        port: of the rendezvous.
    """
    own = {key: value for key, value in os.environ.items() if key != "GLOO_SOCKET_IFNAME"}
    place = {
        "RANK": rank,
        "WORLD_SIZE": len(made),
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    said = {key: str(value) for key, value in place.items()}
    return own | said | {"MASTER_ADDR": made[0].address, "OMP_NUM_THREADS": "1"}


def lacking() -> str:
    """What this machine lacks for hosts with a network of their own, in words; empty where nothing is."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the program `{program}` is missing (iproute2)"
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    name = f"mwtry{secrets.token_hex(3)}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not allowed ({tried.stderr.strip()})"
    ip("netns", "del", name)
    return ""


def namespaces_allowed() -> bool:
    """Whether this user may make network namespaces."""
    return not lacking()


def has_netem() -> bool:
    """Whether the kernel can delay packets itself; tried on an interface that nothing uses."""
    name = f"mwtry{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
        _run("tc", "-n", name, "qdisc", "add", "dev", "try0", "root", "netem", "delay", "1ms")
    except OSError:
        return False
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return True


@contextmanager
def hosts(
    count: int, *, link: Link | None = None, rate: str = "10mbit", network: str = "10.77.0"
) -> Iterator[list[Host]]:
    """``count`` hosts on one switch; addresses of 127.0.0.0/8 where namespaces are not allowed.

    Args:
        count: of hosts.
        link: of each host, with its rates up and down and its delay. Default: none.
        rate: without a link, the rate at which each host sends; empty for none. Default: "10mbit".
        network: the first three numbers of the addresses.
    """
    if not namespaces_allowed():
        print(
            "network namespaces are not allowed here: the hosts are loopback addresses, and the link has no rate"
        )
        yield [Host(address=f"127.0.1.{i + 1}") for i in range(count)]
        return
    with _group() as name:
        made = [Host(address=f"{network}.{i + 1}", namespace=f"{name}h{i}") for i in range(count)]
        switch = f"{name}s"
        relay: subprocess.Popen[bytes] | None = None
        try:
            ip("netns", "add", switch)
            ip("-n", switch, "link", "add", "br0", "type", "bridge")
            ip("-n", switch, "link", "set", "br0", "up")
            for host in made:
                ip("netns", "add", host.namespace)
            delayed = link is not None and link.latency_s > 0
            if link is not None and delayed and not has_netem():
                relay = _start_relay(switch, made, link.latency_s)
            else:
                _plug_cables(switch, made)
            for i, host in enumerate(made):
                _set_up(host, switch, f"p{i}")
                if link is not None:
                    _shape(host, switch, f"p{i}", link, delay=delayed and relay is None)
                elif rate:
                    host.limit(rate)
            yield made
        finally:
            if relay is not None:
                relay.kill()
                relay.wait()
            _delete(name)


def _plug_cables(switch: str, made: Sequence[Host]) -> None:
    for i, host in enumerate(made):
        words = ["link", "add", INTERFACE, "type", "veth", "peer", "name", f"p{i}", "netns", switch]
        ip("-n", host.namespace, *words)


def _start_relay(switch: str, made: Sequence[Host], delay_s: float) -> "subprocess.Popen[bytes]":
    """Cables that delay; ends with its standard input, so with this process."""
    cables = [f"c{i}:p{i}" for i in range(len(made))]
    words = ["ip", "netns", "exec", switch, sys.executable, "-I", str(_RELAY), f"{delay_s:g}", *cables]
    relay = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert relay.stdout is not None
    assert relay.stderr is not None
    ready, _, _ = select.select([relay.stdout], [], [], _RELAY_STARTS_S)
    if not ready or relay.stdout.readline() != b"ready\n":
        relay.kill()
        raise UsageError(
            f"hosts: a delay needs netem, which this kernel lacks, or /dev/net/tun, which does not work here: "
            f"{relay.stderr.read().decode(errors='replace').strip()[-200:]}; leave the latency out of the link"
        )
    for i, host in enumerate(made):
        ip("-n", switch, "link", "set", f"c{i}", "netns", host.namespace, "name", INTERFACE)
    return relay


def _set_up(host: Host, switch: str, port: str) -> None:
    ip("-n", switch, "link", "set", port, "master", "br0", "up")
    ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    ip("-n", host.namespace, "link", "set", INTERFACE, "up")
    ip("-n", host.namespace, "link", "set", "lo", "up")


def _shape(host: Host, switch: str, port: str, link: Link, *, delay: bool) -> None:
    """The rates of a host's link, and its delay where the kernel gives it."""
    up = ["tc", "-n", host.namespace, "qdisc", "replace", "dev", INTERFACE]
    if delay:
        netem = ["netem", "delay", f"{link.latency_s * 1e6:.0f}us", "limit", str(_NETEM_PACKETS)]
        _run(*up, "root", "handle", "1:", *netem)
        _run(*up, "parent", "1:1", "handle", "2:", *_bucket(link.rate_mbit_s))
    else:
        _run(*up, "root", *_bucket(link.rate_mbit_s))
    down = ["tc", "-n", switch, "qdisc", "replace", "dev", port, "root"]
    _run(*down, *_bucket(link.received_mbit_s))


@contextmanager
def _group() -> Iterator[str]:
    """A name for a group of hosts, locked as long as this process lives; what dead processes left is removed first."""
    name = f"mw{secrets.token_hex(3)}"
    _LOCKS.mkdir(exist_ok=True)
    path = _LOCKS / f"{name}.lock"
    with (_LOCKS / "all").open("w") as everybody:
        fcntl.flock(everybody, fcntl.LOCK_EX)
        _remove_stale()
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(os.getpid(), file=lock, flush=True)
    try:
        yield name
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _remove_stale() -> None:
    """Remove the hosts of processes that have ended without doing it, and what still runs on those hosts."""
    for path in _LOCKS.glob("mw*.lock"):
        with path.open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            _delete(path.stem)
            path.unlink(missing_ok=True)


def _delete(name: str) -> None:
    """Delete the namespaces of a group of hosts, and end what still runs in them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for namespace in re.findall(rf"^{name}(?:h\d+|s)\b", listed, re.M):
        inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout
        for pid in inside.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
