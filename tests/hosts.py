"""Hosts with nothing shared but a link: network namespaces on one bridge, or loopback addresses where those are not allowed."""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_counter = itertools.count()


def ip(*words: str) -> None:
    """Run the ``ip`` command."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


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

    def limit(self, rate: str) -> None:
        """Change the rate at which this host sends, such as "1mbit"."""
        words = ["tc", "-n", self.namespace, "qdisc", "replace", "dev", "wan0", "root"]
        shape = ["tbf", "rate", rate, "burst", "32kbit", "latency", "400ms"]
        subprocess.run([*words, *shape], check=True, capture_output=True)

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
        ip("-n", self.namespace, "addr", "del", f"{old}/24", "dev", "wan0")
        ip("-n", self.namespace, "addr", "add", f"{new}/24", "dev", "wan0")


def namespaces_allowed() -> bool:
    """Whether this user may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"mwtry{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    ip("netns", "del", name)
    return True


@contextmanager
def hosts(count: int, *, rate: str = "10mbit", network: str = "10.77.0") -> Iterator[list[Host]]:
    """``count`` hosts on one link, of this rate for each if any; addresses of 127.0.0.0/8 where namespaces are not allowed."""
    if not namespaces_allowed():
        print(
            "network namespaces are not allowed here: the hosts are loopback addresses, and the link has no rate"
        )
        yield [Host(address=f"127.0.1.{i + 1}") for i in range(count)]
        return
    name = f"mw{os.getpid() % 100_000}x{next(_counter)}"
    made = [Host(address=f"{network}.{i + 1}", namespace=f"{name}h{i}") for i in range(count)]
    switch = f"{name}s"
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for i, host in enumerate(made):
            ip("netns", "add", host.namespace)
            ip(
                "-n",
                host.namespace,
                "link",
                "add",
                "wan0",
                "type",
                "veth",
                "peer",
                "name",
                f"p{i}",
                "netns",
                switch,
            )
            ip("-n", switch, "link", "set", f"p{i}", "master", "br0", "up")
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "wan0")
            ip("-n", host.namespace, "link", "set", "wan0", "up")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            if rate:
                host.limit(rate)
        yield made
    finally:
        for host in [*made, Host(address="", namespace=switch)]:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
