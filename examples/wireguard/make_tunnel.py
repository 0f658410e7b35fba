"""Keys and configurations of a WireGuard network in which every machine reaches every other one.

    python examples/wireguard/make_tunnel.py ada=203.0.113.5 ben=198.51.100.7 cleo=

Each machine is NAME=ADDRESS or NAME=ADDRESS:PORT, as the others reach it over the internet; one machine that cannot be reached,
behind a router, is NAME= without one, and calls the others itself. A folder for each machine holds its muonwire.conf, to be put
into /etc/wireguard there; docs/wireguard.md has all steps. Keys come from `wg`, or from `openssl` where WireGuard is not installed.
"""

import argparse
import base64
import ipaddress
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = "muonwire.conf"
KEEPALIVE_S = 25
_KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine of the network.

    Args:
        name: of its folder.
        endpoint: address and port over which the others reach it; empty where they do not.
        port: that it listens on.
        address: inside the tunnel.
        private_key: known to this machine alone.
        public_key: known to all.
    """

    name: str
    endpoint: str
    port: int
    address: str
    private_key: str
    public_key: str


def make_keys() -> tuple[str, str]:
    """A private key of X25519 and its public one, as WireGuard writes them."""
    if shutil.which("wg"):
        private = _output(["wg", "genkey"])
        return private.decode().strip(), _output(["wg", "pubkey"], private).decode().strip()
    if shutil.which("openssl"):
        # In the form DER the key itself is what stands last.
        private = _output(["openssl", "genpkey", "-algorithm", "X25519", "-outform", "DER"])
        options = ["-inform", "DER", "-pubout", "-outform", "DER"]
        public = _output(["openssl", "pkey", *options], private)
        return _encode(private[-_KEY_BYTES:]), _encode(public[-_KEY_BYTES:])
    raise SystemExit("make_tunnel: neither wg nor openssl is installed; apt install wireguard-tools")


def _output(command: Sequence[str], given: bytes = b"") -> bytes:
    return subprocess.run(command, input=given, stdout=subprocess.PIPE, check=True).stdout


def _encode(key: bytes) -> str:
    return base64.b64encode(key).decode()


def parse_machines(texts: Sequence[str], network: ipaddress.IPv4Network, port: int) -> list[Machine]:
    """The machines with fresh keys and their addresses in the tunnel, in the order given."""
    hosts = network.hosts()
    made: list[Machine] = []
    for text in texts:
        found = re.fullmatch(r"([A-Za-z0-9-]{1,32})=(?:(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(?::(\d{1,5}))?)?", text)
        if found is None:
            raise SystemExit(
                f"make_tunnel: {text!r}; a machine is NAME=ADDRESS, NAME=ADDRESS:PORT or NAME= (IPv6 addresses in brackets)"
            )
        name, address, own_port = found[1], found[2], int(found[3] or port)
        if name in [machine.name for machine in made]:
            raise SystemExit(f"make_tunnel: two machines are called {name!r}; give each its own name")
        inside = next(hosts, None)
        if inside is None:
            raise SystemExit(
                f"make_tunnel: {network} has no room for {len(texts)} machines; give a larger --network"
            )
        private, public = make_keys()
        endpoint = f"{address}:{own_port}" if address else ""
        made.append(
            Machine(
                name=name,
                endpoint=endpoint,
                port=own_port,
                address=str(inside),
                private_key=private,
                public_key=public,
            )
        )
    hidden = [machine.name for machine in made if not machine.endpoint]
    if len(made) < 2 or len(hidden) > 1:
        raise SystemExit(
            f"make_tunnel: {len(made)} machine(s), of which {len(hidden)} have no address ({', '.join(hidden)}); at least 2 are "
            "needed, and of every two machines one must be reachable"
        )
    return made


def configuration(machine: Machine, machines: Sequence[Machine], network: ipaddress.IPv4Network) -> str:
    """The file of one machine, as wg-quick reads it."""
    lines = [
        "[Interface]",
        f"# {machine.name}",
        f"PrivateKey = {machine.private_key}",
        f"Address = {machine.address}/{network.prefixlen}",
        f"ListenPort = {machine.port}",
    ]
    for other in machines:
        if other is machine:
            continue
        lines += [
            "",
            "[Peer]",
            f"# {other.name}",
            f"PublicKey = {other.public_key}",
            f"AllowedIPs = {other.address}/32",
        ]
        lines += [f"Endpoint = {other.endpoint}"] if other.endpoint else []
        # Routers forget a connection that is silent.
        lines += [f"PersistentKeepalive = {KEEPALIVE_S}"]
    return "\n".join(lines) + "\n"


def write(machines: Sequence[Machine], network: ipaddress.IPv4Network, folder: Path) -> None:
    """A folder for each machine, which only its owner may enter."""
    if folder.exists():
        raise SystemExit(
            f"make_tunnel: {folder} is there already; new keys would end its tunnel: choose another --out"
        )
    for machine in machines:
        place = folder / machine.name
        place.mkdir(parents=True, mode=0o700)
        opened = os.open(place / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(opened, "w") as file:
            file.write(configuration(machine, machines, network))


def main() -> None:
    """Read the arguments and write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machines", nargs="+", metavar="NAME=ADDRESS[:PORT]")
    parser.add_argument(
        "--network", type=ipaddress.IPv4Network, default=ipaddress.IPv4Network("10.99.0.0/24")
    )
    parser.add_argument(
        "--port", type=int, default=51820, help="that machines listen on (UDP); default: 51820"
    )
    parser.add_argument("--out", type=Path, default=Path("tunnel"))
    arguments = parser.parse_args()
    machines = parse_machines(arguments.machines, arguments.network, arguments.port)
    write(machines, arguments.network, arguments.out)
    for machine in machines:
        print(f"{machine.address}  {machine.name}  {arguments.out / machine.name / FILE}")


if __name__ == "__main__":
    main()
