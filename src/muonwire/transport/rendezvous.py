"""Replicas find each other: through which network interface, and whether every one of them can be reached.

gloo listens on the interface that the machine's own name resolves to, which is the loopback one on many machines, and waits for
minutes where nobody can reach it. So the interface that routes to the master is looked up first, and every pair of replicas
tries a connection before the process group is made.

Before that they make sure that all hold the same secret, or none does and none listens where the internet can reach it. The
secret itself does not travel, but a tag of random numbers that all have written into the store.
"""

import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from muonwire.errors import ExchangeError, UsageError
from muonwire.transport.interfaces import Interface, interface_to, interfaces
from muonwire.transport.secret import Secret

# How long replicas are waited for before they train, and how long a message is waited for while they do.
JOIN_TIMEOUT_S = 30.0
EXCHANGE_TIMEOUT_S = 600.0
LINGER_S = 3.0
BACKENDS = ("gloo", "nccl")
_PREFIX = "muonwire/join"
# Of the replicas of the default process group, by rank: what messages tell of them.
_addresses: dict[int, str] = {}


def address_of(rank: int) -> str:
    """The address of a replica of the default process group; empty where ``join`` did not make the group, or on loopback."""
    return _addresses.get(rank, "")


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The replicas that have found each other, before any process group is made of them.

    Args:
        store: that all of them share.
        rank: of this replica.
        world_size: their number.
        interface: that leads to the master.
        gpus: of each replica the GPU that it has, or none.
    """

    store: Store
    rank: int
    world_size: int
    interface: Interface
    gpus: tuple[str, ...]

    @property
    def has_gpu_each(self) -> bool:
        """Whether every replica has a GPU, and no two have the same."""
        return all(self.gpus) and len(set(self.gpus)) == self.world_size


def join(
    *,
    backend: str,
    join_timeout_s: float = JOIN_TIMEOUT_S,
    timeout_s: float = EXCHANGE_TIMEOUT_S,
    secret: Secret | None = None,
    allow_public: bool = False,
) -> Interface:
    """Make the default process group of the replicas that a launcher started, after each has reached each other one.

    Where ``GLOO_SOCKET_IFNAME`` is not set, gloo gets the interface that routes to the master.

    Args:
        backend: "gloo"; or "nccl", which is used if every replica asks for it and has a GPU of its own, the current one; where one
            has none or shares it, all use gloo.
        join_timeout_s: how long the others are waited for. Default: 30.
        timeout_s: how long a message of an exchange is waited for. Default: 600.
        secret: of all replicas; here it is only compared, and ``ProcessGroupTransport(secret=...)`` uses it. Default: none.
        allow_public: listen without a secret where the internet may reach it. Default: no.

    Returns:
        The interface that leads to the master.

    Raises:
        UsageError: another backend.
        ExchangeError: as ``meet``.
    """
    if backend not in BACKENDS:
        raise UsageError(f"join: backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
    gpu = _own_gpu() if backend == "nccl" else ""
    met = meet(join_timeout_s=join_timeout_s, secret=secret, allow_public=allow_public, gpu=gpu)
    met.store.set_timeout(timedelta(seconds=timeout_s))
    dist.init_process_group(
        "nccl" if met.has_gpu_each else "gloo",
        store=met.store,
        rank=met.rank,
        world_size=met.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return met.interface


def _own_gpu() -> str:
    """What names this process's GPU among those of all machines; nothing where there is none, or no nccl."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return ""
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def meet(
    *,
    join_timeout_s: float = JOIN_TIMEOUT_S,
    secret: Secret | None = None,
    allow_public: bool = False,
    gpu: str = "",
) -> Meeting:
    """Let the replicas that a launcher started find and reach each other, without making a process group.

    Args:
        join_timeout_s, secret, allow_public: see ``join``.
        gpu: what names this replica's GPU among those of all machines. Default: none.

    Raises:
        ExchangeError: the master cannot be reached, a replica does not come, two cannot connect, they have different secrets, or
            one would listen on a public address without one; on every replica that came, it names the same replicas.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + join_timeout_s
    interface = chosen_interface(host, port)
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
    try:
        _check_strangers(store, rank, world_size, interface, secret, allow_public, deadline)
        places = _check_reachable(store, rank, world_size, interface, deadline, gpu)
    except ExchangeError:
        if is_master:
            # The store ends with this process; the others have yet to read there what is wrong.
            time.sleep(LINGER_S)
        raise
    _addresses.clear()
    if not interface.is_loopback:
        _addresses.update({peer: place["address"] for peer, place in places.items()})
    gpus = tuple(place["gpu"] for place in places.values())
    return Meeting(store=store, rank=rank, world_size=world_size, interface=interface, gpus=gpus)


def chosen_interface(host: str, port: int) -> Interface:
    """The interface that the user names, or the one that routes to ``host``, which gloo is then told to use.

    Raises:
        UsageError: ``GLOO_SOCKET_IFNAME`` names an interface that is not there.
        ExchangeError: no route leads to ``host``.
    """
    # gloo takes a list, and uses the first for the first connection.
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not chosen:
        found = interface_to(host, port)
        if found.name:
            os.environ["GLOO_SOCKET_IFNAME"] = found.name
        return found
    named = [i for i in interfaces() if i.name == chosen]
    if not named:
        listed = ", ".join(map(str, interfaces()))
        raise UsageError(
            f"replicas: GLOO_SOCKET_IFNAME is {chosen!r}, which has no address on this machine; there are {listed}"
        )
    return named[0]


def _check_strangers(
    store: Store,
    rank: int,
    world_size: int,
    interface: Interface,
    secret: Secret | None,
    allow_public: bool,
    deadline: float,
) -> None:
    """Raise the same error on all replicas where strangers could take part; nothing listens yet but the store."""
    is_open = not (secret or allow_public or interface.is_private)
    own = {"open": str(interface) if is_open else "", "nonce": secrets.token_hex(16) if secret else ""}
    store.set(f"keeps/{rank}", json.dumps(own))
    keeps = _collect(store, "keeps", world_size, deadline, "did not come")
    without = [str(r) for r, kept in keeps.items() if not kept["nonce"]]
    if 0 < len(without) < world_size:
        raise ExchangeError(
            f"replicas: {', '.join(without)} of {world_size} came without a secret, the others with one; give all the same "
            "--secret-file, or MUONWIRE_SECRET_FILE"
        )
    is_public = [f"replica {r} on {kept['open']}" for r, kept in keeps.items() if kept["open"]]
    if is_public:
        raise ExchangeError(
            f"replicas: {', '.join(is_public)} would listen where the internet may reach it, and nothing keeps strangers out; join "
            "the machines by a tunnel (docs/wireguard.md) and give --master-addr its address, or give all replicas the same "
            "--secret-file (or MUONWIRE_SECRET_FILE), or allow it with --allow-public"
        )
    if secret is None:
        return
    nonces = [kept["nonce"].encode() for kept in keeps.values()]

    def proof(*who: bytes) -> str:
        assert secret is not None
        return secret.tag([b"join", *nonces, *who]).hex()

    # The first is the same for all who hold one secret; the second is a replica's own, so that it cannot be copied from another.
    store.set(f"proof/{rank}", json.dumps({"shared": proof(), "own": proof(b"rank %d" % rank)}))
    proofs = _collect(store, "proof", world_size, deadline, "stopped answering")
    groups: dict[str, list[str]] = {}
    for r, given in proofs.items():
        is_genuine = given["shared"] != proof() or given["own"] == proof(b"rank %d" % r)
        groups.setdefault(given["shared"] if is_genuine else f"copied by {r}", []).append(str(r))
    if len(groups) > 1:
        listed = "; ".join(f"replica(s) {', '.join(ranks)}" for ranks in groups.values())
        raise ExchangeError(
            f"replicas: not all hold the same secret ({listed} each have their own); copy one --secret-file to all machines"
        )


def _check_reachable(
    store: Store, rank: int, world_size: int, interface: Interface, deadline: float, gpu: str = ""
) -> dict[int, dict[str, Any]]:
    """Connect to every replica, and raise the same error on all where two of them cannot; returns where they are, by rank."""
    family = socket.AF_INET6 if ":" in interface.address else socket.AF_INET
    with socket.create_server((interface.address, 0), family=family, backlog=world_size) as listener:
        own = {
            "address": interface.address,
            "port": listener.getsockname()[1],
            "interface": interface.name,
            "gpu": gpu,
        }
        store.set(f"place/{rank}", json.dumps(own))
        places = _collect(store, "place", world_size, deadline, "did not come")
        _check_loopback(places)
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
    return places


def _check_loopback(places: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise ExchangeError where some replicas listen on the loopback interface, which the others cannot reach."""
    here = [str(rank) for rank, place in places.items() if ipaddress.ip_address(place["address"]).is_loopback]
    if here and len(here) < len(places):
        raise ExchangeError(
            f"replicas: {', '.join(here)} of {len(places)} can be reached from their own machine only, since the master's name is "
            "an address of the loopback interface there; give --master-addr the master's address in the network"
        )


def _collect(
    store: Store, key: str, world_size: int, deadline: float, what: str
) -> dict[int, dict[str, Any]]:
    """What every replica has written under ``key``, by rank.

    Raises:
        ExchangeError: some have not by the deadline.
    """
    names = [f"{key}/{rank}" for rank in range(world_size)]
    try:
        while not store.check(names) and time.monotonic() < deadline:
            time.sleep(0.05)
        missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        if not missing:
            return {rank: json.loads(store.get(name)) for rank, name in enumerate(names)}
    except RuntimeError as error:
        raise ExchangeError(
            "replicas: the master ended while the replicas were joining; its own message says why"
        ) from error
    raise ExchangeError(
        f"of {world_size} replicas, {', '.join(missing)} {what}; see what is written there, and start all again"
    )
