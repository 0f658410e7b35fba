"""accelerate on every replica, with any recipe between them; see docs/accelerate.md.

    replicas = join_replicas()  # before Accelerator
    accelerator = Accelerator(gradient_accumulation_steps=2)
    optimizer = recipes.one_bit_muon(model, lr=0.014, transport=replicas.transport)
    wire = connect(accelerator, model, optimizer, replicas=replicas)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

The recipe's optimizer goes through ``prepare`` as any other: ``accumulate``, ``clip_grad_norm_``, schedulers, mixed precision and
``save_state`` work. ``connect`` adds what a loop would otherwise have to know.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from muonwire.errors import UsageError
from muonwire.integrations.figures import Figures
from muonwire.integrations.replicas import Replicas
from muonwire.integrations.shards import SameData
from muonwire.optim.chain import ChainOptimizer
from muonwire.transport.digest import check_replicas

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise UsageError(
        f"muonwire.integrations.accelerate needs {error.name}, which is not installed; "
        'pip install "muonwire[integrations]"'
    ) from error

__all__ = ["Connection", "connect"]

# In a folder that save_state has written: whose it is. In the name, so that two that write at once see each other.
WHOSE = "muonwire_replica_{}.json"
# What shards the weights, or makes an optimizer of its own.
_REFUSED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class Connection:
    """What ``connect`` returns: the replica among the others.

    Args:
        optimizer: the recipe's.
        replicas: what ``join_replicas`` gave.
    """

    def __init__(self, optimizer: ChainOptimizer, replicas: Replicas) -> None:
        self.optimizer, self.replicas = optimizer, replicas
        num_parameters = sum(p.numel() for p in optimizer.trained())
        self._figures = Figures(replicas.transport, num_parameters, step=optimizer.num_steps)

    def synchronize(self) -> str:
        """Bring all replicas to the same weights, and compare them; all call it together, before they evaluate or save a model.

        Returns:
            The digest of the trained weights.

        Raises:
            DivergedReplicasError: they differ.
            ExchangeError, ReplicaLostError, PayloadError: as ChainOptimizer.synchronize.
        """
        self.optimizer.synchronize()
        return check_replicas(self.optimizer.named_parameters(), self.replicas.transport)

    def figures(self) -> dict[str, float]:
        """What was sent and waited, for ``accelerator.log``; bits per parameter and step are those since the last call."""
        return self._figures.since_last(step=self.optimizer.num_steps)

    def save(self, folder: str) -> None:
        """Note in a folder of ``save_state`` whose it is, and what was sent before.

        Raises:
            UsageError: the folder is another replica's, or another saves into it at the same time.
        """
        total = {**self._figures.in_all(step=self.optimizer.num_steps), "step": self.optimizer.num_steps}
        own = self._whose(folder)
        own.write_text(json.dumps({"replicas": self.replicas.world_size, "total": total}, indent=1) + "\n")
        others = self._others(folder)
        if others:
            own.unlink()
            raise UsageError(
                f"accelerate: {folder} is the state of replica {others[0]}, this is replica {self.replicas.rank}; give each its "
                f"own, as by save_state(replicas.folder({folder!r})), or by project_dir=replicas.folder(...) of Accelerator"
            )

    def load(self, folder: str) -> None:
        """Make sure that a folder that is about to be loaded is this replica's, and go on from its totals.

        Raises:
            UsageError: it is another's, of another number of replicas, or without that note.
        """
        own, others = self._whose(folder), self._others(folder)
        if not own.exists() and not others:
            raise UsageError(
                f"accelerate: {folder} has no {own.name}, so it was saved without connect(); what compression left out is each "
                "replica's own, and it is not known whose this is"
            )
        whose = json.loads(own.read_text()) if own.exists() else {}
        if whose.get("replicas") != self.replicas.world_size:
            found = f"{self.replicas.rank} of {whose['replicas']}" if whose else str(others[0])
            raise UsageError(
                f"accelerate: {folder} is the state of replica {found}, this is replica {self.replicas.rank} of "
                f"{self.replicas.world_size}; start as many replicas, and load each replica's own, as by "
                "load_state(replicas.folder(...))"
            )
        self._figures.resume(whose["total"], step=whose["total"]["step"])

    def _whose(self, folder: str) -> Path:
        return Path(folder) / WHOSE.format(self.replicas.rank)

    def _others(self, folder: str) -> list[str]:
        """The other replicas whose notes are in the folder."""
        begin, end = WHOSE.split("{}")
        names = [
            path.name.removeprefix(begin).removesuffix(end) for path in Path(folder).glob(WHOSE.format("*"))
        ]
        return sorted(name for name in names if name != str(self.replicas.rank))


def connect(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: ChainOptimizer,
    *,
    replicas: Replicas,
    same_data: bool = False,
) -> Connection:
    """Tell accelerate of the replicas, before ``prepare``.

    Afterwards ``save_state`` and ``load_state`` refuse a folder that is another replica's, and the first step compares the data of
    the replicas, so that no two train on the same.

    Args:
        accelerator: that prepares them.
        model: that is trained.
        optimizer: a recipe's, with ``replicas.transport``.
        replicas: what ``join_replicas`` gave.
        same_data: whether replicas may train on the same data. Default: no.

    Raises:
        UsageError: accelerate sees other processes than this replica's, shards the weights, or the optimizer is no recipe's or has
            another transport.
    """
    if not isinstance(optimizer, ChainOptimizer):
        raise UsageError(
            f"accelerate: the optimizer is a {type(optimizer).__name__}, which does not talk to other replicas; give a recipe's, "
            "or one that muonwire.optim.local_steps has wrapped, before accelerator.prepare"
        )
    if accelerator.distributed_type in _REFUSED:
        raise UsageError(
            f"accelerate: {accelerator.distributed_type} shards the weights or makes an optimizer of its own; use data parallelism "
            "inside a replica, or shard the model in a loop of your own"
        )
    if replicas.world_size > 1 and accelerator.num_processes != replicas.num_inside:
        raise UsageError(
            f"accelerate: it sees {accelerator.num_processes} process(es), this replica has {replicas.num_inside}; call "
            "join_replicas() before Accelerator is made, and on CPUs give cpu=True"
        )
    if optimizer.transport is not replicas.transport:
        raise UsageError(
            f"accelerate: the optimizer's transport ({type(optimizer.transport).__name__}) is not that of the replicas; give the "
            "recipe transport=replicas.transport"
        )
    connection = Connection(optimizer, replicas)

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            connection.save(folder)

    def load(models: list[nn.Module], folder: str) -> None:
        connection.load(folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    if replicas.world_size > 1 and not same_data:
        SameData(replicas.transport).watch(model, optimizer)
    return connection
