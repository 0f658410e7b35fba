"""Transport between replicas that come and go, on torchft: who is there, connections between those, state for who joins.

torchft's lighthouse knows who is alive; its manager forms a quorum of replicas, connects them by a process group that can be made
anew, and hands the state of one that is up to date to those that are behind. Here every replica is a replica group of one process;
for a site (``elastic_sites.py``) its leader is that process.
What torchft leaves open is decided here: whether all replicas of a quorum have all messages of an exchange (``settle``); and in
``optim.elastic``: whether they stand on the same commit, and who brings nothing.
"""

import concurrent.futures
import io
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from typing_extensions import override

from muonwire.errors import ExchangeError, ReplicaLostError, StoppedError, UsageError
from muonwire.transport.ahead import InFlight
from muonwire.transport.base import Flag
from muonwire.transport.interfaces import Interface, interface_to
from muonwire.transport.members import MembersTransport, State
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.rendezvous import chosen_interface
from muonwire.transport.secret import Secret

if TYPE_CHECKING:
    from torchft import Manager

    from muonwire.transport.elastic_parts import Quorums

ELASTIC_TIMEOUT_S = 60.0
# How long one request for a quorum lasts before it is made again, and the pause between looks at what has come of it.
_ASK_S = 60.0
# For how long a lighthouse may refuse before it counts as absent.
_LIGHTHOUSE_STARTS_S = 10.0
_PAUSE_S = 0.2
_RETRIES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ElasticSettings:
    """How replicas that come and go find each other.

    Args:
        lighthouse: "HOST:PORT" of a torchft lighthouse (`torchft_lighthouse --min_replicas 1`).
        min_replicas: how many must be there for a synchronization; with fewer, those that are there wait. Default: 2.
        name: of this replica, different on each; the rank among those present follows the order of the names. Default: the
            machine's name and the process's number.
        timeout_s: how long a replica that is there is waited for: for one message, or to connect. Default: 60.
        join_s: how long the others wait for a replica that takes over the state; its size over the link's rate must fit in.
            Default: 600.
        patience_s: how long too few replicas are waited for. Default: 3600.
        linger_s: how long replicas that have finished wait for those that were there before and are away. Default: 60.

    Raises:
        UsageError: a lighthouse without a port, or a number that is not positive.
    """

    lighthouse: str
    min_replicas: int = 2
    name: str = ""
    timeout_s: float = ELASTIC_TIMEOUT_S
    join_s: float = 600.0
    patience_s: float = 3600.0
    linger_s: float = 60.0

    def __post_init__(self) -> None:
        self.place()
        for name in ("min_replicas", "timeout_s", "join_s", "patience_s", "linger_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"elastic: {name} is {getattr(self, name):g}; it must be positive")
        if ":" in self.name:
            raise UsageError(f"elastic: the name {self.name!r} has a colon; leave it out")

    def place(self) -> tuple[str, int]:
        """Host and port of the lighthouse."""
        text = self.lighthouse.removeprefix("http://").rstrip("/")
        host, colon, port = text.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UsageError(
                f"elastic: the lighthouse is {self.lighthouse!r}; give HOST:PORT, such as 10.0.0.1:29510, of a running "
                "`torchft_lighthouse --min_replicas 1`"
            )
        return host.strip("[]"), int(port)


class ElasticTransport(MembersTransport, ProcessGroupTransport):
    """Transport between those replicas that are there; see MembersTransport.

    Args:
        how: see ElasticSettings.
        device: where messages are kept while they travel. Default: the CPU.
        secret: of all replicas of the run; see ProcessGroupTransport. Default: none.
        run: name of the run that the tags stand for. Default: none.
        allow_public: listen without a secret where the internet may reach it. Default: no.

    Raises:
        UsageError: torchft is not installed.
        ExchangeError: the lighthouse cannot be reached, or strangers could take part.
    """

    def __init__(
        self,
        how: ElasticSettings,
        *,
        device: torch.device | str | None = None,
        secret: Secret | None = None,
        run: str = "",
        allow_public: bool = False,
    ) -> None:
        self._begin_alone(how, how.name or f"{socket.gethostname()}-{os.getpid()}")
        self.secret = secret
        self.run = run
        self._timeout_s = how.timeout_s
        self.interface = self._reach_lighthouse()
        if not (secret or allow_public or self.interface.is_private):
            raise ExchangeError(
                f"elastic: {self.name} would listen on {self.interface}, where the internet may reach it, and nothing keeps "
                "strangers out; join the machines by a tunnel (docs/wireguard.md), or give all replicas the same --secret-file, or "
                "allow it with --allow-public"
            )
        self._prepare(rank=0, world_size=1, device=torch.device(device or "cpu"))
        # What a state is given to, as bytes; a site hands it on first.
        self.take_content = self._take_content
        self._members: tuple[str, ...] = (self.name,)
        # For what this replica waits, in words.
        self._awaited = ""
        self._asker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="muonwire-quorum")
        self._store, self._connections, self._manager, self._quorums = self._start_manager()

    def _reach_lighthouse(self) -> Interface:
        host, port = self.how.place()
        interface = chosen_interface(host, port)
        # One that is being started at the same moment refuses at first.
        until = time.monotonic() + min(_LIGHTHOUSE_STARTS_S, self.how.timeout_s)
        while True:
            try:
                socket.create_connection((host, port), timeout=min(30.0, self.how.timeout_s)).close()
                return interface
            except OSError as error:
                if not isinstance(error, ConnectionRefusedError) or time.monotonic() > until:
                    raise ExchangeError(
                        f"elastic: {self.name} cannot reach the lighthouse {host}:{port} through {interface}: "
                        f"{error.strerror or error}; check that `torchft_lighthouse` runs there, its address and port, and that no "
                        "firewall lies between"
                    ) from error
            time.sleep(_PAUSE_S)

    def _start_manager(self) -> "tuple[TCPStore, Any, Manager, Quorums]":
        # torchft's core writes each quorum to standard error unless it is told otherwise before it is loaded.
        os.environ.setdefault("RUST_LOG", "error")
        try:
            from torchft import Manager

            from muonwire.transport.elastic_parts import Connections, Quorums, StateTransport
        except ImportError as error:
            raise UsageError(
                f"elastic: torchft is needed for replicas that come and go ({error}); pip install 'muonwire[elastic]'"
            ) from error
        for logger in ("torchft", "torchft_quorums", "torchft_commits", "torchft_errors"):
            logging.getLogger(logger).setLevel(logging.CRITICAL + 1)
        limit = timedelta(seconds=self.how.timeout_s)
        address = self.interface.address
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        connections = Connections(timeout=limit)
        host, port = self.how.place()
        manager = Manager(
            pg=connections,
            load_state_dict=self._take,
            state_dict=self._give,
            # Whether enough are there is decided in ``form``, with a message.
            min_replica_size=1,
            use_async_quorum=False,
            timeout=timedelta(seconds=max(self.how.timeout_s, self.how.join_s)),
            quorum_timeout=timedelta(seconds=_ASK_S),
            connect_timeout=limit,
            rank=0,
            world_size=1,
            store_addr=_in_url(address),
            store_port=store.port,
            lighthouse_addr=f"http://{_in_url(host)}:{port}",
            replica_id=self.name,
            hostname=_in_url(address),
            checkpoint_transport=StateTransport(
                timeout=limit,
                longest=timedelta(seconds=max(self.how.timeout_s, self.how.join_s)),
                address=_in_url(address),
            ),
            init_sync=False,
            # The lighthouse may be away for a while; for how long replicas wait is decided in ``form``.
            quorum_retries=_RETRIES,
        )
        manager._client = quorums = Quorums(manager._client)
        connections.mark = lambda: quorums.commits
        connections.let_go = self._let_go
        return store, connections, manager, quorums

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the replicas of this quorum, by rank."""
        return self._members

    @members.setter
    def members(self, names: Sequence[str]) -> None:
        self._members = tuple(names)

    @property
    @override
    def commits(self) -> int:
        return int(self._manager.current_step())

    @commits.setter
    @override
    def commits(self, count: int) -> None:
        self._manager.load_state_dict({"step": count, "batches_committed": count})

    @override
    def form(self) -> bool:
        self._awaited = "the other replicas to synchronize"
        with self.waits.on(lambda: self._awaited, answer="the replicas met"):
            world_size = self._meet(time.monotonic())
        is_new = self._connections.epoch != self.epoch or self._failure is not None
        if is_new:
            self._reset(world_size=world_size)
        return is_new

    def _meet(self, began: float) -> int:
        """The number of replicas of a quorum that is large enough and connected."""
        while True:
            self._ask(began)
            failure = self._manager.errored()
            world_size = int(self._manager.num_participants())
            if failure is None and world_size >= self.how.min_replicas:
                return world_size
            if failure is None:
                self._reset(world_size=world_size)
                why = f"{world_size} of at least {self.how.min_replicas} replicas are there"
                self._awaited = f"more replicas ({why})"
            else:
                why = f"the replicas could not connect ({_first_line(failure)})"
                self._awaited = f"all to be connected ({why})"
                self._check_address()
            self.commit(failure=ReplicaLostError(why))
            self._check_patience(began, why)
            time.sleep(_PAUSE_S)

    def _ask(self, began: float) -> None:
        """One quorum, however long it takes."""
        while True:
            # torchft raises a quorum's error again when the next is asked for.
            self._manager._quorum_future = None
            asked = self._asker.submit(self._manager.start_quorum)
            while not concurrent.futures.wait([asked], timeout=_PAUSE_S).done:
                self._check_patience(began, self._awaited)
            try:
                asked.result()
                return
            except (RuntimeError, TimeoutError) as error:
                why = _first_line(error)
                self._awaited = (
                    f"the lighthouse {self.how.lighthouse} and the replicas that are there ({why})"
                )
                self._check_patience(began, why)
                time.sleep(_PAUSE_S)

    def _check_address(self) -> None:
        """Leave, rather than hold up all others, where they cannot reach this replica any more."""
        now = interface_to(*self.how.place())
        if now.address != self.interface.address:
            raise ExchangeError(
                f"{self.name} came as {self.interface}, and is now {now}, where the others do not know it; start it "
                "again with --resume"
            )

    def _check_patience(self, began: float, why: str) -> None:
        if self.stopping():
            raise StoppedError(f"{self.name} was asked to stop while it waited for the other replicas")
        waited_s = time.monotonic() - began
        if waited_s > self.how.patience_s:
            raise ExchangeError(
                f"{self.name} waited {waited_s:.0f} s for other replicas, and no longer ({why}); start them with the same "
                "--lighthouse, or give a longer --patience-s"
            )

    def _reset(self, *, world_size: int) -> None:
        """Start afresh on the connections of this quorum."""
        rank = self._manager.participating_rank()
        self.epoch = self._connections.epoch
        self.reset(rank=0 if rank is None else rank, world_size=world_size, epoch=self.epoch)
        self.agreed = Flag.NONE
        self.members, self.sizes = self._quorums.names, ()
        if self.secret is not None and self._links is None:
            self._links = self._make_links(self.secret, self.run, epoch=self.epoch)

    def _give(self) -> State:
        """The state as bytes under a tag, which holds for this quorum alone; without a secret the tag is empty."""
        file = io.BytesIO()
        torch.save(self.give_state(), file)
        return {
            "state": torch.frombuffer(file.getbuffer(), dtype=torch.uint8),
            "tag": self._tag(file.getvalue()),
        }

    def _take(self, sent: State) -> None:
        """Check and take over what another replica gave.

        Raises:
            ExchangeError: it was altered, or comes from somebody without the secret.
        """
        content = sent["state"].numpy().tobytes()
        if sent["tag"] != self._tag(content):
            raise ExchangeError(
                f"the state that {self.name} was sent was altered, or comes from somebody without the secret; it is fetched again"
            )
        self.take_content(content)

    def _take_content(self, content: bytes) -> None:
        self.take_state(torch.load(io.BytesIO(content), weights_only=True))

    def _tag(self, content: bytes) -> str:
        if self.secret is None:
            return ""
        place = f"{self.run}/{self._connections.epoch}".encode()
        return self.secret.tag([b"state", place, content]).hex()

    @contextmanager
    @override
    def patient(self) -> Iterator[None]:
        limit_s = self.how.join_s if self._quorums.somebody_joins else self.how.timeout_s
        self._timeout_s, self._limit = limit_s, timedelta(seconds=limit_s)
        try:
            yield
        finally:
            self._timeout_s, self._limit = self.how.timeout_s, None

    @override
    def commit(self, failure: Exception | None = None) -> bool:
        if failure is not None:
            self.abort(failure)
        return bool(self._manager.should_commit())

    def abort(self, failure: Exception) -> None:
        """End the connections, so that the others need not wait for this replica's messages until their time is over."""
        self._manager.report_error(failure)
        self._connections.abort()
        self._failure = self._failure or ReplicaLostError(str(failure))

    def _let_go(self) -> None:
        """Hold nothing of the last quorum's messages."""
        self._left = []
        self._ahead = self._none_ahead()

    @override
    def settle(self) -> None:
        gather = super().gather
        self._settling(lambda: gather(b"", purpose="settle"))

    @override
    def _start(self, sends: bool, peer: int, buffer: Tensor, tag: int) -> InFlight:
        try:
            group = self._connections.parent
            work = group.send([buffer], peer, tag) if sends else group.recv([buffer], peer, tag)
        except (RuntimeError, AssertionError) as error:
            raise self._lost(peer, RuntimeError(str(error) or "the connections are closed")) from error
        return InFlight(peer, buffer, work)

    @override
    def _also_lost(self, message: InFlight) -> str:
        # Looking ends all connections, and the others may still finish the exchange without this replica.
        return ""

    @override
    def close(self) -> None:
        if self._links is not None:
            self._links.stop()
        self._let_go()
        self._connections.abort()
        self._manager.shutdown(wait=False)
        self._asker.shutdown(wait=False, cancel_futures=True)


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address
