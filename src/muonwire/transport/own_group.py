"""Transport over connections of its own, of which torch.distributed's process groups know nothing.

Training frameworks take the default process group for theirs: they wrap the model in DistributedDataParallel and gather metrics
over it. Where each replica is to be a world of its own to them, the way between the replicas must be no process group that they
can see.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.transport.ahead import InFlight
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.rendezvous import EXCHANGE_TIMEOUT_S, address_of
from muonwire.transport.secret import Secret


class OwnGroupTransport(ProcessGroupTransport):
    """Transport between replicas over gloo connections that ``torch.distributed`` does not know.

    Args:
        store: that these replicas share, under a prefix of this group's own.
        rank: of this replica among them.
        world_size: their number.
        numbers: of the replicas among all that have met, by rank; messages tell their addresses. Default: their ranks.
        secret: of all replicas; see ProcessGroupTransport. Default: none.
        run: name of the run that the tags stand for. Default: none.
        timeout_s: how long a message is waited for. Default: 600.

    Raises:
        ReplicaLostError: another replica does not make its end.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        numbers: Sequence[int] | None = None,
        secret: Secret | None = None,
        run: str = "",
        timeout_s: float = EXCHANGE_TIMEOUT_S,
    ) -> None:
        self._prepare(rank=rank, world_size=world_size, device=torch.device("cpu"))
        self._store = store
        self._numbers = list(range(world_size)) if numbers is None else list(numbers)
        self._secret, self._run = secret, run
        self._timeout_s = timeout_s
        self.waits.limit_s = timeout_s
        self._channels: list[ProcessGroupTransport] = []
        try:
            self._connections: Any = dist.ProcessGroupGloo(
                store, rank, world_size, timedelta(seconds=timeout_s)
            )
        except RuntimeError as error:
            raise self._lost(None, error) from error
        if secret is not None:
            self._links = self._make_links(secret, run, epoch=0)

    @override
    def called(self, rank: int) -> str:
        address = address_of(self._numbers[rank])
        return f"replica {rank} ({address})" if address else f"replica {rank}"

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        """Raise: the connections are not there where it would be unpickled.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "OwnGroupTransport: it cannot be pickled, since its connections are not there where it is unpickled; save the "
            "optimizer's state_dict(), and join the replicas and make the optimizer anew before loading it"
        )

    @property
    @override
    def _beside(self) -> list[ProcessGroupTransport]:
        return self._channels

    @override
    def _make_beside(self, name: str) -> ProcessGroupTransport:
        return OwnGroupTransport(
            PrefixStore(name, self._store),
            rank=self.rank,
            world_size=self.world_size,
            numbers=self._numbers,
            secret=self._secret,
            run=f"{self._run}/{name}",
            timeout_s=self._timeout_s,
        )

    @override
    def _start(self, sends: bool, peer: int, buffer: Tensor, tag: int) -> InFlight:
        group = self._connections
        try:
            work = group.send([buffer], peer, tag) if sends else group.recv([buffer], peer, tag)
        except RuntimeError as error:
            raise self._lost(peer, error) from error
        return InFlight(peer, buffer, work)
