"""A step on sharded weights: elementwise stages work on the shards, and every other stage on whole tensors, each with one owner.

The members of a chain before the first that needs whole tensors, and those behind the last, work on shards. For those between, the
*core*, each tensor has an owner among the processes of the replica, by what it costs. An all-to-all makes whole updates, and whole
states of the parameters' shape, out of their shards on the owners; these run the core, and talk of their tensors with the
processes in the same place of the other replicas; a second all-to-all makes shards again. States of other shapes are the same on
all processes of the replica: the owner tells them.

All groups of a step travel together. What a core that talks needs is gathered before it runs, in buckets; other cores run bucket by
bucket.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim import nested, shards
from muonwire.optim.groups import rates
from muonwire.optim.passes import Pass
from muonwire.optim.shards import FAILED, OTHERS, Item, Swapper
from muonwire.stages.base import State
from muonwire.stages.chain import Chain
from muonwire.stages.rounds import Rounds, drive
from muonwire.transport.base import Transport
from muonwire.transport.mesh import MeshTransport
from muonwire.transport.shards import Cut, as_sharded, cut_of, is_sharded, local

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer

_OWN = struct.Struct("<?I")
_NOTHING = torch.empty(0)


def share(
    optimizer: "ChainOptimizer", params: Sequence[Tensor], problem: str | None, *, overflowed: bool
) -> tuple[str | None, bool]:
    """Share within the replica what is wrong with the gradients, and what its processes have to announce; see inside.average.

    Raises:
        UsageError: the processes have gradients of other parameters.
        ExchangeError: they are in different steps, or have different rates.
    """
    transport = optimizer.transport
    assert isinstance(transport, MeshTransport)
    present = zlib.crc32(bytes(p.grad is not None for p in params))
    before, transport.settings = transport.settings, rates(optimizer.param_groups)
    told = transport.share(_OWN.pack(overflowed, present) + (problem or "").encode())
    transport.settings = before
    overflows, there = zip(*(_OWN.unpack_from(message) for message in told), strict=True)
    if len(set(there)) > 1:
        raise UsageError(
            "ChainOptimizer: the processes of this replica have gradients of different parameters; let all use the same ones in a "
            "step, and set their gradients to none together"
        )
    for place, message in enumerate(told):
        if problem is None and len(message) > _OWN.size:
            problem = f"{message[_OWN.size :].decode()}, on process {place} of this replica"
    return problem, any(overflows)


def run(
    passes: Sequence[Pass],
    transport: MeshTransport,
    talking: Transport,
    settle: Callable[[], None] = lambda: None,
) -> list[list[Tensor]]:
    """Run the passes' chains; returns their updates, this process's shards.

    An error of one process is raised by all of its replica.

    Args:
        passes: of sharded parameters.
        transport: of the replica.
        talking: to the other replicas, as in the passes' contexts.
        settle: called after the messages of each round with them. Default: nothing.
    """
    return _Run([_Work(p) for p in passes], transport, talking, settle).results()


class _Work:
    """One pass: its chain in three parts, and where its tensors stand.

    Attributes:
        current: this process's shards of what the members so far have returned.
        leaves: of each tensor, what of the core's states is sharded: by path, how it is cut, and its dtype.
        wholes: what the core is given of the tensors that this process owns: update, parameter and states.
        made: what it returned of them.
    """

    def __init__(self, of: Pass) -> None:
        self.of = of
        members = of.chain.members
        cores = [i for i, (_, stage) in enumerate(members) if not stage.elementwise]
        first, last = (cores[0], cores[-1] + 1) if cores else (len(members), len(members))
        self.prefix, self.core, self.suffix = (
            Chain(members[begin:end]) for begin, end in ((0, first), (first, last), (last, len(members)))
        )
        self.cuts = [_cut(p) for p in of.params]
        self.current = list(of.updates)
        self._shards: list[State] = [
            {
                name: nested.localized(state[name])
                for name, _ in (*self.prefix.members, *self.suffix.members)
                if name in state
            }
            for state in of.states
        ]
        self.leaves: list[list[tuple[nested.Path, Cut, torch.dtype]]] = [
            [
                (path, cut, leaf.dtype)
                for path, leaf in sorted(nested.tensors_of(state, {name for name, _ in self.core.members}))
                if is_sharded(leaf) and (cut := cut_of(param, leaf.shape)) is not None
            ]
            for param, state in zip(of.params, of.states, strict=True)
        ]
        self.wholes: dict[int, tuple[Tensor, Tensor, State]] = {}
        self.made: dict[int, tuple[Tensor, State]] = {}

    def on_shards(self, chain: Chain) -> Rounds:
        """The rounds of the prefix or the suffix."""
        return chain.rounds(self.current, self.of.seen, self._shards, self.of.context)

    def keep(self) -> None:
        """Put what elementwise members have replaced in their states back into the parameters' states."""
        for param, state, own in zip(self.of.params, self.of.states, self._shards, strict=True):
            nested.write_back(own, state, param)

    def items(self, i: int, owner: int, *, to_owner: bool) -> list[Item]:
        """What travels of tensor ``i``: the update, with ``to_owner`` the parameter if it is read, and the leaves."""
        cut, weight = self.cuts[i], self.of.seen[i]
        number = 2 if to_owner and self.core.reads_params else 1
        kinds = [(cut, weight.dtype)] * number + [(of, dtype) for _, of, dtype in self.leaves[i]]
        return [Item(cut=of, dtype=dtype, owner=owner) for of, dtype in kinds]

    def own_shards(self, i: int) -> list[Tensor]:
        """This process's shards of these items, to the owner."""
        reads = [self.of.seen[i]] if self.core.reads_params else []
        kept = [local(nested.at(self.of.states[i], path)) for path, _, _ in self.leaves[i]]
        return [self.current[i], *reads, *kept]

    def give(self, i: int, whole: Sequence[Tensor]) -> None:
        """Take the whole tensors of these items."""
        weight = self.of.seen[i]
        update, *rest = whole
        if self.core.reads_params:
            param, *rest = rest
        else:
            # It has the shape, and no memory.
            param = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(self.cuts[i].shape)
        state = nested.copied(
            {name: self.of.states[i][name] for name, _ in self.core.members if name in self.of.states[i]}
        )
        for (path, _, _), tensor in zip(self.leaves[i], rest, strict=True):
            nested.put(state, path, tensor)
        self.wholes[i] = update, param, state

    def on_wholes(self) -> tuple[list[int], Rounds]:
        """The core's rounds with the tensors that it was given, and which these are."""
        chosen = sorted(self.wholes)
        updates, params, states = zip(*(self.wholes.pop(i) for i in chosen), strict=True)
        self.made.update({i: (_NOTHING, state) for i, state in zip(chosen, states, strict=True)})
        context = self.of.context.of_some(chosen)
        return chosen, self.core.rounds(list(updates), list(params), list(states), context)

    def results_of(self, i: int) -> list[Tensor]:
        """What the owner has of these items, on the way back; zeros where a state is not there any more."""
        update, state = self.made[i]
        found = [update.to(self.of.seen[i].dtype)]
        for path, cut, dtype in self.leaves[i]:
            leaf = nested.at(state, path)
            fits = isinstance(leaf, Tensor) and tuple(leaf.shape) == cut.shape
            found.append(leaf.to(dtype) if fits else update.new_zeros(cut.shape, dtype=dtype))
        return found

    def take(self, i: int, found: Sequence[Tensor]) -> None:
        """Take this process's shards of these items."""
        update, *rest = found
        self.current[i] = update
        for (path, cut, _), shard in zip(self.leaves[i], rest, strict=True):
            nested.put(self.of.states[i], path, as_sharded(shard, cut, self.of.params[i]))

    def has_others(self) -> bool:
        """Whether any state of the core is not cut, or was not, before or after it ran."""
        names = {name for name, _ in self.core.members}
        for i, (_, state) in self.made.items():
            paths = {path for path, _, _ in self.leaves[i]}
            for found in (self.of.states[i], state):
                if {path for path, _ in nested.leaves(found, names)} != paths:
                    return True
        return False

    def others(self) -> list[Any]:
        """What the owner tells of the states: by tensor, all that is not cut."""
        return [
            [i, nested.described(state, {path for path, _, _ in self.leaves[i]})]
            for i, (_, state) in self.made.items()
        ]

    def take_others(self, i: int, told: dict[str, Any]) -> None:
        """Take what the owner tells of the states of tensor ``i``."""
        state, param = self.of.states[i], self.of.params[i]
        for name, _ in self.core.members:
            if name in told:
                state[name] = nested.read(told[name], state.get(name), param)
            else:
                state.pop(name, None)


class _Run:
    """The steps of ``run``."""

    def __init__(
        self,
        works: Sequence[_Work],
        transport: MeshTransport,
        talking: Transport,
        settle: Callable[[], None],
    ) -> None:
        self._works = works
        self._transport = transport
        self._talking = talking
        self._settle = settle
        self._swapper = Swapper(transport)
        self._error: Exception | None = None
        # Every tensor that goes through a core: its pass and its number there.
        self._tensors = [(w, i) for w in works if w.core.members for i in range(len(w.cuts))]
        self._owners = shards.owners([_cost(w, i) for w, i in self._tensors], transport.num_inside)

    def results(self) -> list[list[Tensor]]:
        """The updates of all passes."""
        if not self._tensors:
            act = self._prefixes
            if self._talks([w.prefix for w in self._works]):
                self._transport.as_one(act)
            else:
                act()
        else:
            self._guarded(self._prefixes)
            self._cores()
            if self._talks([w.suffix for w in self._works]):
                self._transport.as_one(self._suffixes)
            else:
                self._suffixes()
        for work in self._works:
            work.keep()
        return [work.current for work in self._works]

    def _talks(self, chains: Sequence[Chain]) -> bool:
        return self._talking.world_size > 1 and any(chain.talks for chain in chains)

    @property
    def _waits(self) -> bool:
        """Whether chains of elementwise stages alone run beside the cores, in whose messages they then talk."""
        with_core = [w for w in self._works if w.core.members]
        return self._talks([w.core for w in with_core]) and not self._talks([w.prefix for w in with_core])

    def _prefixes(self) -> None:
        self._on_shards([(w, w.prefix) for w in self._works if w.core.members or not self._waits])

    def _suffixes(self) -> None:
        self._on_shards([(w, w.suffix) for w in self._works if w.suffix.members])

    def _on_shards(self, parts: Sequence[tuple[_Work, Chain]]) -> None:
        found = drive([w.on_shards(chain) for w, chain in parts], self._talking, self._settle)
        for (work, _), updates in zip(parts, found, strict=True):
            work.current = updates

    def _cores(self) -> None:
        sizes = [
            sum(item.num_bytes(0) for item in w.items(i, 0, to_owner=True)) * self._transport.num_inside
            for w, i in self._tensors
        ]
        waves = shards.buckets(sizes, self._owners, shards.BUCKET_BYTES)
        if self._talks([w.core for w in self._works]):
            for wave in waves:
                self._gather(wave)
            self._guarded(self._talk)
            for number, wave in enumerate(waves):
                self._scatter(wave, first=number == 0)
            return
        for wave in waves:
            self._gather(wave)
            self._guarded(self._run_cores)
            self._scatter(wave, first=True)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Act; an error is kept until all processes have heard of it, in the next all-to-all."""
        try:
            act()
        except Exception as error:
            if self._transport.failed:
                raise
            self._error = error

    def _check(self, status: int) -> None:
        """Raise on all processes what went wrong on any."""
        if self._error is not None:
            self._transport.tell(self._error)
            raise self._error
        if status & FAILED:
            self._transport.gather_inside(b"")
            raise AssertionError("a process has failed and said nothing")

    def _gather(self, wave: Sequence[int]) -> None:
        items, own, spans = [], [], []
        for k in wave:
            work, i = self._tensors[k]
            of_tensor = work.items(i, self._owners[k], to_owner=True)
            spans.append(len(of_tensor))
            items += of_tensor
            own += work.own_shards(i) if self._error is None else _zeros(of_tensor, self._transport)
        failed = FAILED if self._error is not None else 0
        wholes, status = self._swapper.to_owners(items, own, status=failed)
        self._check(status)
        position = 0
        for k, length in zip(wave, spans, strict=True):
            work, i = self._tensors[k]
            if self._owners[k] == self._transport.place:
                work.give(i, [w for w in wholes[position : position + length] if w is not None])
            # What has travelled needs no place here until its result comes back.
            work.current[i] = _NOTHING
            position += length

    def _talk(self) -> None:
        beside = [w.prefix for w in self._works if self._waits and not w.core.members]
        if not any(w.wholes and w.core.talks for w in self._works) and not self._talks(beside):
            # The flags of the other replicas' processes in this place; they own nothing that is exchanged, too.
            self._talking.gather(b"")
            self._settle()
        self._run_cores()

    def _run_cores(self) -> None:
        running = [(w, *w.on_wholes()) for w in self._works if w.wholes]
        beside = [w for w in self._works if self._waits and not w.core.members]
        found = drive(
            [rounds for _, _, rounds in running] + [w.on_shards(w.prefix) for w in beside],
            self._talking,
            self._settle,
        )
        for work in beside:
            work.current = found.pop(len(running))
        for (work, chosen, _), updates in zip(running, found, strict=True):
            work.made.update({i: (u, work.made[i][1]) for i, u in zip(chosen, updates, strict=True)})

    def _scatter(self, wave: Sequence[int], *, first: bool) -> None:
        mine = [k for k in wave if self._owners[k] == self._transport.place]
        failed = self._error is not None
        status = FAILED if failed else OTHERS if any(w.has_others() for w in self._works) else 0
        wholes: list[Tensor | None] = []
        items, spans = [], []
        for k in wave:
            work, i = self._tensors[k]
            of_tensor = work.items(i, self._owners[k], to_owner=False)
            spans.append(len(of_tensor))
            items += of_tensor
            if k not in mine:
                wholes += [None] * len(of_tensor)
            else:
                wholes += _whole_zeros(of_tensor, self._transport) if failed else work.results_of(i)
        found, status = self._swapper.to_shards(items, wholes, status=status)
        self._check(status)
        if first and status & OTHERS:
            self._tell_others()
        position = 0
        for k, length in zip(wave, spans, strict=True):
            work, i = self._tensors[k]
            work.take(i, found[position : position + length])
            work.made.pop(i, None)
            position += length

    def _tell_others(self) -> None:
        """What the owners keep and is not cut goes to all processes."""
        told = [[n, w.others()] for n, w in enumerate(self._works) if w.made]
        for message in self._transport.gather_inside(nested.packed(told)):
            for number, of_work in nested.unpacked(message):
                for i, states in of_work:
                    self._works[number].take_others(i, states)


def _cut(param: Tensor) -> Cut:
    cut = cut_of(param)
    assert cut is not None
    return cut


def _cost(work: _Work, i: int) -> float:
    """What the core costs of a tensor: its entries, and for polar factors the products of its matrices."""
    shape = work.cuts[i].shape
    numel = float(torch.Size(shape).numel())
    if not work.core.orthogonalizes:
        return numel
    return numel * (1 + min(work.of.context.layouts[i].shapes(shape)[0][-2:]) / 256)


def _zeros(items: Sequence[Item], transport: MeshTransport) -> list[Tensor]:
    return [
        torch.zeros(item.cut.shard_shape(transport.place), dtype=item.dtype, device=transport.device)
        for item in items
    ]


def _whole_zeros(items: Sequence[Item], transport: MeshTransport) -> list[Tensor]:
    return [torch.zeros(item.cut.shape, dtype=item.dtype, device=transport.device) for item in items]
