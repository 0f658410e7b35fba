"""Replicas for training frameworks: to the framework each replica looks as if a launcher had started it alone.

A framework that finds several processes takes them for its own data parallelism: it wraps the model in DistributedDataParallel,
which sends whole gradients in every step, gathers losses and metrics over all of them, and saves what process 0 holds. So the
processes of a launch are divided: those of one replica are all that the framework sees, and the replicas are joined by connections
that it does not see (``OwnGroupTransport``).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from muonwire.errors import UsageError
from muonwire.integrations.shards import shard
from muonwire.transport.base import SingleReplica, Transport
from muonwire.transport.digest import check_agreement
from muonwire.transport.own_group import OwnGroupTransport
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.rendezvous import EXCHANGE_TIMEOUT_S, JOIN_TIMEOUT_S, Meeting, meet
from muonwire.transport.secret import find_secret
from muonwire.transport.site_groups import LONGER_S
from muonwire.transport.sites import SiteTransport

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAUNCHER = {
    *_NEEDED,
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
}


# What join_replicas has joined, with the processes of a replica: the launcher's variables are gone then.
_joined: "list[tuple[int, Replicas]]" = []


@dataclass(frozen=True)
class Replicas:
    """The replicas of a training, as one of their processes sees them.

    Args:
        transport: between the replicas. A SiteTransport where a replica has several processes, which act as one; it must leave the
            mean of their gradients to the framework (``averages=False``).

    >>> Replicas(SingleReplica()).world_size
    1
    """

    transport: Transport

    @property
    def rank(self) -> int:
        """The number of this process's replica."""
        return self.transport.rank

    @property
    def world_size(self) -> int:
        """How many replicas there are."""
        return self.transport.world_size

    @property
    def num_inside(self) -> int:
        """Processes of a replica, which the framework sees as its world."""
        return self.transport.num_inside

    def shard(self, dataset: Any) -> Any:
        """This replica's part of a dataset: of R replicas, replica r has the samples r, r + R, r + 2R, ...

        All parts have as many samples, so that all replicas take as many steps; up to R − 1 samples at the end are in none. The
        framework divides a replica's part among the replica's own processes.

        Args:
            dataset: with a length and an index, such as a list, a torch Dataset or a datasets.Dataset; or an iterable one.

        Returns:
            ``dataset`` itself where there is one replica; a datasets.Dataset of one; else a torch dataset.

        Raises:
            UsageError: it has fewer samples than there are replicas, or is no dataset.
        """
        return shard(dataset, rank=self.rank, world_size=self.world_size)

    def folder(self, path: str | Path) -> Path:
        """Where this replica keeps its checkpoints: ``path/replica_1``, or ``path`` where there is one replica.

        Each replica keeps what is its own, such as what its compression left out, so no two may share a folder.
        """
        own = f"replica_{self.rank}"
        path = Path(path)
        return path if self.world_size == 1 or path.name == own else path / own

    def close(self) -> None:
        """Say goodbye to the other replicas, where messages are sealed by a secret, so that each stays until the others have all
        they need; else nothing. Call it at the end of the program.
        """
        close = getattr(self.transport, "close", None)
        if close is not None:
            close()

    def newest_in_all(self, steps: Sequence[int]) -> int | None:
        """The highest step that every replica has a checkpoint of, or None at the first start; all replicas call it together.

        None, too, where replicas were killed while they saved for the first time, so that some have one and others none.

        Args:
            steps: of which this replica has one.

        Raises:
            UsageError: there is no such step, though replicas have gone further; on all of them.
        """
        told = self.transport.everyone.gather(json.dumps(sorted(steps)).encode(), purpose="control")
        found: list[list[int]] = [json.loads(steps) for steps in told]
        common = set.intersection(*map(set, found))
        if not common and (all(found) or any(len(of_one) > 1 for of_one in found)):
            what = "; ".join(
                f"process {i}: {', '.join(map(str, its)) or 'none'}" for i, its in enumerate(found)
            )
            raise UsageError(
                f"replicas: there is no checkpoint that all have; those that each has are of the steps {what}. Give each its own "
                "folder back, with as many replicas as before, or begin a new run in another folder"
            )
        return max(common, default=None)


def join_replicas(
    *,
    processes_per_replica: int = 1,
    join_timeout_s: float = JOIN_TIMEOUT_S,
    timeout_s: float = EXCHANGE_TIMEOUT_S,
    secret_file: str | Path | None = None,
    allow_public: bool = False,
) -> Replicas:
    """Join the replicas that torchrun, or another launcher that sets its variables, has started; call it before the framework.

    Afterwards a framework sees this replica alone. Where a replica is one process, it is as if no launcher had started it: the
    launcher's variables are gone, and of several GPUs CUDA_VISIBLE_DEVICES names the one of its LOCAL_RANK. Where it has several,
    they are torch.distributed's default process group, and RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are theirs.

    Between replicas messages travel through gloo; inside a replica the framework uses nccl on GPUs.

    Without a launcher, or where all its processes make one replica, there is one, and nothing is changed. Called again, as in a
    notebook, it returns what it has joined.

    Args:
        processes_per_replica: how many processes make a replica; those whose ranks follow one another, as torchrun numbers the
            processes of a machine. Default: 1.
        join_timeout_s: how long the others are waited for at the start, in seconds. Default: 30.
        timeout_s: how long a message is waited for, in seconds. Default: 600.
        secret_file: what all replicas share, so that no stranger takes part. Default: what MUONWIRE_SECRET_FILE names, or none.
        allow_public: listen without a secret where the internet may reach it. Default: no.

    Raises:
        UsageError: torch.distributed is initialized already, the processes cannot be divided so, they were divided in another way
            before, or the launcher has left out a variable.
        ExchangeError: the replicas do not find or reach each other, or give different numbers.
    """
    inside = processes_per_replica
    for before, replicas in _joined:
        if before != inside:
            raise UsageError(
                f"join_replicas: {inside} process(es) a replica, but they were joined with {before} before; join them once, "
                "and hand on what it returns"
            )
        return replicas
    count = int(os.environ.get("WORLD_SIZE", "1"))
    missing = [key for key in _NEEDED if key not in os.environ]
    if missing and count > 1:
        raise UsageError(
            f"join_replicas: WORLD_SIZE is {count}, but {', '.join(missing)} is not set; let torchrun start the processes, or set "
            f"{', '.join(_NEEDED)} on each of them"
        )
    if inside < 1 or count % inside:
        raise UsageError(
            f"join_replicas: {count} process(es) with {inside} a replica; give processes_per_replica a number that divides them"
        )
    if count == inside:
        return Replicas(SingleReplica())
    if dist.is_initialized():
        raise UsageError(
            f"join_replicas: torch.distributed is initialized already, with {dist.get_world_size()} process(es), so the framework "
            "would take them for its own data parallelism; call join_replicas() once, before TrainingArguments, Accelerator or "
            "whatever else makes a process group"
        )
    secret = find_secret(None if secret_file is None else Path(secret_file))
    met = meet(join_timeout_s=join_timeout_s, secret=secret, allow_public=allow_public)
    met.store.set_timeout(timedelta(seconds=timeout_s))
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")

    def group(name: str, ranks: Sequence[int], wait_s: float) -> OwnGroupTransport:
        return OwnGroupTransport(
            PrefixStore(f"replicas/{name}", met.store),
            rank=ranks.index(met.rank),
            world_size=len(ranks),
            numbers=ranks,
            secret=secret,
            run=f"{run}/{name}",
            timeout_s=wait_s,
        )

    everyone = group("all", range(count), timeout_s)
    check_agreement(f"{inside} processes a replica", everyone, what="numbers of processes a replica")
    _show_inside(met, inside, wait_s=timeout_s + 2 * LONGER_S)
    if inside == 1:
        return _note(inside, everyone)
    ranks = [list(range(first, first + inside)) for first in range(0, count, inside)]
    leaders = [of_replica[0] for of_replica in ranks]
    between = group("leaders", leaders, timeout_s + LONGER_S) if met.rank in leaders else None
    made = SiteTransport(everyone, ProcessGroupTransport(), between, ranks=ranks, averages=False)
    made.waits.limit_s = timeout_s
    everyone.waits = made.waits
    everyone.members = tuple(made.members[rank // inside] for rank in range(count))
    return _note(inside, made)


def _note(inside: int, transport: Transport) -> Replicas:
    _joined.append((inside, Replicas(transport)))
    return _joined[0][1]


def _show_inside(met: Meeting, inside: int, *, wait_s: float) -> None:
    """Let the framework see the processes of this replica alone: a world of their own, or no launcher where there is one."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if inside == 1:
        if torch.cuda.device_count() > 1:
            _see_one_gpu(local)
        for key in [*os.environ]:
            if key in _LAUNCHER or (key.startswith("TORCHELASTIC_") and key != "TORCHELASTIC_ERROR_FILE"):
                del os.environ[key]
        return
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    if on_gpu:
        torch.cuda.set_device(local % torch.cuda.device_count())
    replica, rank = divmod(met.rank, inside)
    store: Store = PrefixStore(f"replica {replica}", met.store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=inside,
        timeout=timedelta(seconds=wait_s),
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", inside))
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(inside),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(min(here, inside)),
    }


def _see_one_gpu(local: int) -> None:
    """Leave this process one GPU of the machine's: a framework without a launcher takes all that it sees."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UsageError(
            "join_replicas: this process uses a GPU already, and its replica is to have one of its own; call join_replicas() "
            "before anything is put on a GPU"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ids[local % len(ids)]
