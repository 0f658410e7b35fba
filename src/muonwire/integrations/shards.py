"""Different data for every replica: a dataset's part, and the proof that replicas do not train on the same."""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from muonwire.errors import UsageError
from muonwire.transport.base import Transport

DIGEST_BYTES = 8


class Shard(Dataset[Any]):
    """Every R-th sample of a dataset, from number r on; all shards of a dataset have as many samples.

    Args:
        dataset: with a length and an index.
        rank: r, from 0 to R − 1.
        world_size: R.

    Raises:
        UsageError: there are fewer samples than shards.

    >>> list(Shard("abcdefg", rank=1, world_size=3))
    ['b', 'e']
    """

    def __init__(self, dataset: Any, *, rank: int, world_size: int) -> None:
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self._length = len(dataset) // world_size
        if not self._length:
            raise UsageError(
                f"shard: the dataset has {len(dataset)} sample(s) for {world_size} replicas; give at least one a replica"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(f"shard: index {index} of {self._length} samples")
        return self.dataset[(index % self._length) * self.world_size + self.rank]


class StreamShard(IterableDataset[Any]):
    """Every R-th sample of a stream, from number r on, as long as the stream has one for each of the R shards.

    Args:
        dataset: to iterate over; every replica iterates over all of it, in the same order.
        rank: r, from 0 to R − 1.
        world_size: R.

    >>> list(StreamShard("abcdefg", rank=0, world_size=3))
    ['a', 'd']
    """

    def __init__(self, dataset: Any, *, rank: int, world_size: int) -> None:
        self.dataset, self.rank, self.world_size = dataset, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.dataset)
        while len(round_of_all := list(itertools.islice(samples, self.world_size))) == self.world_size:
            yield round_of_all[self.rank]

    def set_epoch(self, epoch: int) -> None:
        """Hand the number of the epoch to the stream, where it wants it to shuffle anew."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def shard(dataset: Any, *, rank: int, world_size: int) -> Any:
    """A replica's part of a dataset; see Replicas.shard."""
    if world_size == 1:
        return dataset
    if isinstance(dataset, Mapping):
        raise UsageError(
            f"shard: {type(dataset).__name__} holds {', '.join(map(str, dataset))}; give one of these datasets"
        )
    if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
        raise UsageError(
            f"shard: {type(dataset).__name__} has neither an index nor an iterator; give a dataset"
        )
    # torch's IterableDataset inherits an index, and may have a length, too.
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not indexed:
        return StreamShard(dataset, rank=rank, world_size=world_size)
    own = Shard(dataset, rank=rank, world_size=world_size)
    if hasattr(dataset, "select") and hasattr(dataset, "column_names"):
        # Of the datasets library: one of its own kind keeps its columns, which the Trainer reads.
        return dataset.select(range(rank, len(own) * world_size, world_size))
    return own


class SameData:
    """Notices where replicas train on the same data: compares what went into their models first.

    Args:
        transport: between the replicas.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport, self._inside = transport.everyone, transport.num_inside
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self._seen = False

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """See what goes into the model, and check it before the optimizer's first step, on all replicas."""
        seen = model.register_forward_pre_hook(
            lambda _, args, kwargs: self.see(args, kwargs), with_kwargs=True
        )

        def before_step(*_: Any) -> None:
            seen.remove()
            stepped.remove()
            self.check()

        stepped = optimizer.register_step_pre_hook(before_step)

    def see(self, *batch: Any) -> None:
        """Take a batch into account: all tensors in it. What is only evaluated does not count."""
        for tensor in _tensors(batch) if torch.is_grad_enabled() else ():
            self._seen = True
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._digest.update(content.numpy().data)

    def check(self) -> None:
        """Compare with the other replicas; all call it together. One that has seen no tensors says nothing.

        Raises:
            UsageError: two replicas have seen the same; on all of them.
        """
        seen = self._transport.gather(self._digest.digest() if self._seen else b"", purpose="control")
        if same := same_among(seen, inside=self._inside):
            which = " and ".join(map(str, same))
            raise UsageError(
                f"replicas: processes {which} of {len(seen)} took their first step on the same data, so they would train as one; "
                "give each replica its own part, as by train_dataset=replicas.shard(dataset), or same_data=True if it is meant"
            )


def same_among(seen: Sequence[bytes], *, inside: int = 1) -> list[int]:
    """The ranks that have told the same digest, where they belong to several replicas; empty digests do not count.

    Processes of one replica may have the same data: the framework repeats samples where there are fewer than it needs.

    Args:
        seen: the digests, in rank order.
        inside: processes of a replica. Default: 1.

    >>> same_among([b"", b"a", b"b", b"", b"a"]), same_among([b"a", b"b"]), same_among([b"a", b"a", b"b", b"c"], inside=2)
    ([1, 4], [], [])
    """
    for own in dict.fromkeys(filter(None, seen)):
        ranks = [rank for rank, its in enumerate(seen) if its == own]
        if len({rank // inside for rank in ranks}) > 1:
            return ranks
    return []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "items"):
        yield from _tensors(dict(value.items()))
