"""Hosts with nothing shared but a link: replicas find each other without a variable set by hand, or say who is missing."""

import os
import socket
import subprocess
import threading
import time

import pytest
from torch.distributed import HashStore

from muonwire.compare.hosts import hosts, namespaces_allowed
from muonwire.errors import ExchangeError, UsageError
from muonwire.train.status import read_status
from muonwire.transport.interfaces import Interface, interface_to
from muonwire.transport.rendezvous import (
    _check_loopback,
    _check_reachable,
    _check_strangers,
    chosen_interface,
    join,
)
from muonwire.transport.secret import Secret
from tests.commands import Command
from tests.tiny_task import TINY

TRAIN = (
    "--recipe",
    "one_bit_muon(interval=2)",
    *TINY,
    "--batch",
    "2",
    "--sequence",
    "16",
    "--steps",
    "4",
)
JOIN = """
import sys
from muonwire.errors import ExchangeError, UsageError
from muonwire.transport.rendezvous import join
try:
    join(backend="gloo", join_timeout_s=float(sys.argv[1]))
except ExchangeError as error:
    sys.exit(f"refused: {error}")
from muonwire.transport import ProcessGroupTransport
transport = ProcessGroupTransport()
print([payload.decode() for payload in transport.gather(str(transport.rank).encode())])
"""


CHOICE = """
import sys
import torch.distributed as dist
from muonwire.transport import rendezvous
rendezvous._own_gpu = lambda: sys.argv[1]
def chosen(backend, *, store, rank, world_size, **_):
    print(backend)
    store.set(f"chosen/{rank}", "")
    if rank == 0:
        # Here is the store, which the others may still read.
        store.wait([f"chosen/{r}" for r in range(world_size)])
dist.init_process_group = chosen
rendezvous.join(backend=sys.argv[2])
"""


def start(host, words, *, rank, world_size, master, port, folder):
    """One replica on a host, with torchrun's variables and none of gloo's."""
    env = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
    env |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": master, "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}
    log = folder / f"replica{rank}.log"
    return Command(words, python=True, host=host, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def end(processes, within_s):
    """The exit codes; processes that are left are killed."""
    deadline = time.monotonic() + within_s
    try:
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize(
    ("count", "words", "outcome"),
    [
        (2, ["-m", "muonwire", "train", *TRAIN, "--out", "run"], "step 4: evaluation loss"),
        (4, ["-c", JOIN, "20"], "['0', '1', '2', '3']"),
    ],
    ids=["train", "exchange"],
)
def test_hosts_work_together_without_a_variable_set(count, words, outcome, tmp_path, free_port):
    with hosts(count) as machines:
        processes = [
            start(
                host,
                words,
                rank=rank,
                world_size=count,
                master=machines[0].address,
                port=free_port,
                folder=_folder(tmp_path / f"host{rank}"),
            )
            for rank, host in enumerate(machines)
        ]
        codes = end(processes, 100)
    logs = [(tmp_path / f"host{r}" / f"replica{r}.log").read_text() for r in range(count)]
    assert codes == [0] * count, logs
    assert outcome in logs[0]
    if words[0] == "-m":
        # Each host knows of the run from its own folder.
        assert [read_status(tmp_path / f"host{r}" / "run").state for r in range(count)] == [
            "finished"
        ] * count
    if words[0] == "-m" and namespaces_allowed():
        for rank in range(count):
            assert f"replica {rank} of {count}: on wan0 (10.77.0.{rank + 1})" in logs[rank]


@pytest.mark.parametrize(
    ("gpus", "backends", "chosen"),
    [
        (("one", "two"), ("nccl", "nccl"), "nccl"),
        (("one", "one"), ("nccl", "nccl"), "gloo"),
        (("one", ""), ("nccl", "nccl"), "gloo"),
        (("one", "two"), ("nccl", "gloo"), "gloo"),
    ],
    ids=["each has one", "two share one", "one has none", "one does not ask"],
)
def test_nccl_is_what_all_can_use_or_nobody_does(gpus, backends, chosen, tmp_path, free_port):
    processes = [
        start(
            None,
            ["-c", CHOICE, gpus[rank], backends[rank]],
            rank=rank,
            world_size=2,
            master="127.0.0.1",
            port=free_port,
            folder=tmp_path,
        )
        for rank in (0, 1)
    ]
    codes = end(processes, 40)
    logs = [(tmp_path / f"replica{r}.log").read_text() for r in (0, 1)]
    assert codes == [0, 0], logs
    assert [log.split() for log in logs] == [[chosen]] * 2


def test_another_backend_is_refused_before_anybody_is_met():
    with pytest.raises(UsageError, match="backend is 'mpi'; allowed are gloo, nccl"):
        join(backend="mpi")


def test_those_that_came_name_the_same_missing_replica_in_time(tmp_path, free_port):
    with hosts(3) as machines:
        began = time.monotonic()
        came = [
            start(
                machines[rank],
                ["-c", JOIN, "8"],
                rank=rank,
                world_size=3,
                master=machines[0].address,
                port=free_port,
                folder=tmp_path,
            )
            for rank in (0, 1)
        ]
        assert end(came, 30) == [1, 1]
        assert time.monotonic() - began < 25
    for rank in (0, 1):
        said = (tmp_path / f"replica{rank}.log").read_text()
        assert "refused: of 3 replicas, 2 did not come" in said, said


def test_a_master_that_cannot_be_reached_is_named_in_time(tmp_path, free_port):
    with hosts(2) as machines:
        began = time.monotonic()
        alone = start(
            machines[1],
            ["-c", JOIN, "3"],
            rank=1,
            world_size=2,
            master=machines[0].address,
            port=free_port,
            folder=tmp_path,
        )
        assert end([alone], 30) == [1]
        assert time.monotonic() - began < 25
    said = (tmp_path / "replica1.log").read_text()
    assert f"refused: replica 1 cannot reach the master {machines[0].address}:{free_port} through" in said, (
        said
    )


def test_the_interface_is_the_one_that_leads_there():
    found = interface_to("127.0.0.1", 1)
    assert found.name in ("lo", "lo0")
    assert found.address == "127.0.0.1"
    with pytest.raises(ExchangeError, match=r"no way from this machine to no\.such\.host\.invalid"):
        interface_to("no.such.host.invalid", 1)


def test_a_master_that_takes_its_own_name_for_a_loopback_address_is_told():
    with pytest.raises(
        ExchangeError, match=r"0 of 2 can be reached from their own machine only.*--master-addr"
    ):
        _check_loopback({0: {"address": "127.0.1.1"}, 1: {"address": "10.77.0.2"}})
    _check_loopback({0: {"address": "127.0.0.1"}, 1: {"address": "127.0.0.1"}})


def test_two_that_cannot_connect_are_named_on_both(monkeypatch):
    connect = socket.create_connection

    def refused(place, timeout):
        if threading.current_thread().name == "1" and place[1] != own["1"]:
            raise ConnectionRefusedError(111, "Connection refused")
        return connect(place, timeout=timeout)

    serve = socket.create_server
    own = {}

    def listening(place, **options):
        made = serve(place, **options)
        own[threading.current_thread().name] = made.getsockname()[1]
        return made

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket, "create_server", listening)
    store, said = HashStore(), {}

    def replica(rank):
        try:
            _check_reachable(store, rank, 2, Interface(name="lo", address="127.0.0.1"), time.monotonic() + 10)
        except ExchangeError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=replica, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said[0] == said[1]
    assert (
        "replica 1 (127.0.0.1) cannot reach replica 0 (127.0.0.1): Connection refused; open the ports"
        in said[0]
    )


def test_an_interface_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    with pytest.raises(UsageError, match=r"GLOO_SOCKET_IFNAME is 'eth77'.*there are lo \(127\.0\.0\.1\)"):
        chosen_interface("127.0.0.1", 1)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth0")
    assert chosen_interface("127.0.0.1", 1) == Interface(name="lo", address="127.0.0.1")


def strangers(kept):
    """What each of some replicas says, given the secret and the address of each; none where it has nothing against them."""
    store, said = HashStore(), {}

    def replica(rank, secret, address, allow):
        place = Interface(name="", address=address)
        try:
            _check_strangers(store, rank, len(kept), place, secret, allow, time.monotonic() + 10)
            said[rank] = None
        except ExchangeError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=replica, args=(rank, *one)) for rank, one in enumerate(kept)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [said[rank] for rank in range(len(kept))]


ONE, OTHER = Secret(bytes(range(32))), Secret(bytes(range(1, 33)))


@pytest.mark.parametrize(
    "kept",
    [
        [(None, "10.0.0.1", False), (None, "192.168.3.4", False), (None, "fd00::1", False)],
        [(None, "127.0.0.1", False), (None, "100.64.0.9", False)],
        [(None, "203.0.113.5", True), (None, "10.0.0.1", False)],
        [(ONE, "203.0.113.5", False), (ONE, "2001:db8::1", False)],
        [(ONE, "10.0.0.1", False)] * 3,
    ],
    ids=["private", "shared", "allowed", "public with a secret", "a secret"],
)
def test_replicas_among_themselves_are_let_in(kept):
    assert strangers(kept) == [None] * len(kept)


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (
            [(None, "10.0.0.1", False), (None, "203.0.113.5", False), (None, "2001:db8::1", False)],
            "replicas: replica 1 on 203.0.113.5, replica 2 on 2001:db8::1 would listen where the internet may reach it",
        ),
        ([(ONE, "10.0.0.1", False), (None, "10.0.0.2", False)], "replicas: 1 of 2 came without a secret"),
        (
            [(ONE, "10.0.0.1", False), (OTHER, "10.0.0.2", False), (ONE, "10.0.0.3", False)],
            "not all hold the same secret (replica(s) 0, 2; replica(s) 1 each have their own)",
        ),
    ],
    ids=["public", "one without", "another secret"],
)
def test_who_lets_strangers_in_is_named_on_all(kept, reason):
    said = strangers(kept)
    assert len(set(said)) == 1
    assert reason in said[0]


def test_a_proof_that_is_copied_does_not_pass(monkeypatch):
    store = HashStore()
    copied = {}

    def stranger():
        """Has no secret, and writes what replica 0 wrote."""
        store.set("keeps/1", store.get("keeps/0"))
        store.set("proof/1", store.get("proof/0"))
        copied["done"] = True

    thread = threading.Thread(target=stranger)
    thread.start()
    with pytest.raises(ExchangeError, match="not all hold the same secret"):
        _check_strangers(
            store, 0, 2, Interface(name="", address="10.0.0.1"), ONE, False, time.monotonic() + 10
        )
    thread.join()
    assert copied["done"]


def test_private_addresses_and_tunnels_are_known(monkeypatch, tmp_path):
    private = ["127.9.9.9", "::1", "10.1.2.3", "172.31.0.1", "192.168.0.1", "169.254.1.1", "100.127.0.1"]
    private += ["fd12::1", "fe80::1"]
    public = ["8.8.8.8", "172.32.0.1", "100.128.0.1", "203.0.113.1", "2001:db8::1", "2a00::1"]
    for address in private:
        assert Interface(name="eth0", address=address).is_private, address
    for address in public:
        assert not Interface(name="none0", address=address).is_private, address
    # Without a system that says what an interface is, its name does; with one, the name says nothing.
    assert Interface(name="wg7", address="203.0.113.1").is_private
    monkeypatch.setattr("muonwire.transport.interfaces._SYSTEM", tmp_path)
    for name, kind in (("wg0", "65534"), ("wg1", "1"), ("home", "1"), ("tap0", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(kind + "\n")
    (tmp_path / "tap0" / "tun_flags").write_text("0x1002\n")
    found = {
        name: Interface(name=name, address="203.0.113.1").is_private
        for name in ("wg0", "wg1", "home", "tap0")
    }
    assert found == {"wg0": True, "wg1": False, "home": False, "tap0": True}


def _folder(path):
    path.mkdir()
    return path
