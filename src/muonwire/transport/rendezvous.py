"""Replicas find each other: through which network interface, and whether every one of them can be reached.

gloo listens on the interface that the machine's own name resolves to, which is the loopback one on many machines, and waits for
minutes where nobody can reach it. So the interface that routes to the master is looked up first, and every pair of replicas
tries a connection before the process group is made.
"""

import fcntl
import ipaddress
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from muonwire.errors import ExchangeError

# How long replicas are waited for before they train, and how long a message is waited for while they do.
JOIN_TIMEOUT_S = 30.0
EXCHANGE_TIMEOUT_S = 600.0
_SIOCGIFADDR = 0x8915
_PREFIX = "muonwire/join"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface of this machine.

    Args:
        name: as the system calls it, such as eth0.
        address: an address of it.
    """

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether it leads to this machine only."""
        return ipaddress.ip_address(self.address).is_loopback

    def __str__(self) -> str:
        """Name and address."""
        return f"{self.name} ({self.address})"


def interface_to(host: str, port: int) -> Interface:
    """The interface through which this machine's packets to ``host`` leave.

    Args:
        host: name or address.
        port: any.

    Raises:
        ExchangeError: the name is unknown, or no route leads there.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            # Connecting a datagram socket sends nothing; it asks for the route.
            probe.connect(place)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise ExchangeError(
            f"replicas: there is no way from this machine to {host}: {error.strerror or error}; check the address of the master "
            "(--master-addr) and the network"
        ) from error
    return Interface(name=_owner(address), address=address)


def _owner(address: str) -> str:
    """The interface that has an address."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return _loopback()
    for _, name in socket.if_nameindex():
        if wanted in _addresses(name):
            return name
    raise ExchangeError(f"replicas: no network interface of this machine has the address {address}")


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])


def _addresses(name: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        # An interface may have no IPv4 address.
        with suppress(OSError):
            yield ipaddress.IPv4Address(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, owner = line.split()
        if owner == name:
            yield ipaddress.IPv6Address(bytes.fromhex(digits))


def join(
    *, backend: str, join_timeout_s: float = JOIN_TIMEOUT_S, timeout_s: float = EXCHANGE_TIMEOUT_S
) -> Interface:
    """Make the default process group of the replicas that a launcher started, after each has reached each other one.

    Where ``GLOO_SOCKET_IFNAME`` is not set, gloo gets the interface that routes to the master.

    Args:
        backend: "gloo" or "nccl".
        join_timeout_s: how long the others are waited for. Default: 30.
        timeout_s: how long a message of an exchange is waited for. Default: 600.

    Returns:
        The interface that leads to the master.

    Raises:
        ExchangeError: the master cannot be reached, a replica does not come, or two cannot connect; on every replica that came, it
            names the same pairs.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + join_timeout_s
    interface = interface_to(host, port)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface.name)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun's agent is the master of its store already.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = PrefixStore(
            f"{_PREFIX}/{attempt}",
            TCPStore(
                host,
                port,
                world_size,
                is_master=is_master,
                timeout=timedelta(seconds=join_timeout_s),
                # Whoever is missing is named below, on all sides.
                wait_for_workers=False,
                multi_tenant=True,
            ),
        )
    except RuntimeError as error:
        raise ExchangeError(
            f"replica {rank} cannot reach the master {host}:{port} through {interface} within {join_timeout_s:g} s; "
            "check that the master runs, its address and port, and that no firewall lies between"
        ) from error
    _check_reachable(store, rank, world_size, interface, deadline)
    store.set_timeout(timedelta(seconds=timeout_s))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    return interface


def _check_reachable(store: Store, rank: int, world_size: int, interface: Interface, deadline: float) -> None:
    """Connect to every replica, and raise the same error on all where two of them cannot."""
    family = socket.AF_INET6 if ":" in interface.address else socket.AF_INET
    with socket.create_server((interface.address, 0), family=family, backlog=world_size) as listener:
        own = {"address": interface.address, "port": listener.getsockname()[1], "interface": interface.name}
        store.set(f"place/{rank}", json.dumps(own))
        places = _collect(store, "place", world_size, deadline, "did not come")
        failures = {}
        for peer, place in places.items():
            left = max(1.0, deadline - time.monotonic())
            try:
                socket.create_connection((place["address"], place["port"]), timeout=left).close()
            except OSError as error:
                failures[peer] = str(error.strerror or error)
        store.set(f"reached/{rank}", json.dumps(failures))
        # The others may need as long again: what one of them found is said by all.
        found = _collect(store, "reached", world_size, deadline + 5.0, "stopped answering")
    pairs = [
        f"replica {at} ({places[at]['address']}) cannot reach replica {peer} ({places[int(peer)]['address']}): {why}"
        for at, failed in found.items()
        for peer, why in failed.items()
    ]
    if pairs:
        raise ExchangeError(
            f"{'; '.join(pairs)}; open the ports between these machines, or set GLOO_SOCKET_IFNAME to the interface of the network "
            "that joins them"
        )


def _collect(
    store: Store, key: str, world_size: int, deadline: float, what: str
) -> dict[int, dict[str, str]]:
    """What every replica has written under ``key``, by rank.

    Raises:
        ExchangeError: some have not by the deadline.
    """
    names = [f"{key}/{rank}" for rank in range(world_size)]
    while not (complete := store.check(names)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if not complete:
        missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        raise ExchangeError(
            f"of {world_size} replicas, {', '.join(missing)} {what}; see what is written there, and start all again"
        )
    return {rank: json.loads(store.get(name)) for rank, name in enumerate(names)}
