"""What a recipe exchanges of a model: the stages that talk, on which tensors, how often, and the bytes of it each way."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.agreement import Handshake, floating_buffers
from muonwire.optim.fragments import cut, first_counts
from muonwire.optim.settings import LocalSteps
from muonwire.recipes import find, parse_recipe
from muonwire.stages import Adam, Chain, Exchange, Mean, Stage
from muonwire.stages.layout import MatrixLayout
from muonwire.transport.frames import LENGTH_BYTES
from muonwire.transport.header import HEADER

# Before each of several payloads in one message stands its length.
JOINED_BYTES = 4
# Payloads of a gather that differ by no more than this part of the longest fit into frames of one length (``transport.frames``).
ALIKE = 64
# Of the step in which a fragment is merged on arrival.
PROPOSAL_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes of an exchange of all replicas, by rank; expected ones.

    Args:
        egress_bytes: that leave each replica, a copy for each peer, headers included.
        received_bytes: that come to each.
        num_messages: that wait for one another, once lengths are known from an earlier round.
    """

    egress_bytes: tuple[float, ...]
    received_bytes: tuple[float, ...]
    num_messages: int

    @property
    def up_bytes(self) -> float:
        """Of the replica that sends most."""
        return max(self.egress_bytes)

    @property
    def down_bytes(self) -> float:
        """Of the replica that receives most."""
        return max(self.received_bytes)

    @property
    def all_bytes(self) -> float:
        """That all replicas together send."""
        return sum(self.egress_bytes)

    @classmethod
    def none(cls, replicas: int) -> "Traffic":
        """No message at all."""
        zeros = (0.0,) * replicas
        return cls(egress_bytes=zeros, received_bytes=zeros, num_messages=0)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            egress_bytes=_added(self.egress_bytes, other.egress_bytes),
            received_bytes=_added(self.received_bytes, other.received_bytes),
            num_messages=self.num_messages + other.num_messages,
        )


def _added(one: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _gathered(num_bytes: Sequence[float]) -> Traffic:
    """Replica r's payload of Pᵣ bytes to every peer: (R − 1)(Pᵣ + header) leave it, and all others' come to it.

    A frame holds the shortest payload where they differ, and the rest follows in a message of its own.
    """
    peers, framed = len(num_bytes) - 1, [n + HEADER.size for n in num_bytes]
    total = sum(framed)
    alike = max(num_bytes) - min(num_bytes) <= max(num_bytes) / ALIKE
    return Traffic(
        egress_bytes=tuple(peers * n for n in framed),
        received_bytes=tuple(total - n for n in framed),
        num_messages=1 if alike else 2,
    )


def _parted(num_bytes: Sequence[float]) -> Traffic:
    """Pⱼ bytes from every replica to replica j: Σⱼ Pⱼ over the others leave replica r, and (R − 1) Pᵣ come to it; and headers."""
    peers, framed = len(num_bytes) - 1, [n + HEADER.size + LENGTH_BYTES for n in num_bytes]
    total = sum(framed)
    return Traffic(
        egress_bytes=tuple(total - n for n in framed),
        received_bytes=tuple(peers * n for n in framed),
        num_messages=1,
    )


def _averaged(num_bytes: Sequence[float]) -> Traffic:
    """Replica j averages the j-th part and sends it to all: 2 (R − 1)(P / R + header) both ways."""
    replicas = len(num_bytes)
    parts = 2.0 * (replicas - 1) * (math.ceil(num_bytes[0] / replicas) + HEADER.size)
    return Traffic(egress_bytes=(parts,) * replicas, received_bytes=(parts,) * replicas, num_messages=2)


# The operations of a transport: the traffic of ``Asked.num_bytes``.
OPERATIONS: dict[str, Callable[[Sequence[float]], Traffic]] = {
    "gather": _gathered,
    "parts": _parted,
    "mean": _averaged,
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request of a stage (``stages.rounds.Request``), by its bytes.

    Args:
        operation: a key of OPERATIONS.
        num_bytes: by rank: of each replica's payload ("gather"), of what every replica sends to this one ("parts"), or of the
            tensors to average, the same on all ("mean"); without headers.
        apart: requests that differ in it travel in messages of their own. Default: all of an operation travel together.
        least_messages: that it takes, where the bytes do not tell. Default: 1.
    """

    operation: str
    num_bytes: tuple[float, ...]
    apart: str = ""
    least_messages: int = 1

    def own_bytes(self, rank: int) -> float:
        """What replica ``rank`` sends of its own, each payload once however many get it."""
        others = sum(self.num_bytes) - self.num_bytes[rank]
        return others if self.operation == "parts" else self.num_bytes[rank]


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A stage that talks, and the tensors that go through it."""

    stage: Stage
    params: Sequence[Tensor]
    layouts: Sequence[MatrixLayout]

    def of(self, chosen: Callable[[Tensor], bool]) -> "Talk":
        """The same of some of the tensors."""
        kept = [(p, layout) for p, layout in zip(self.params, self.layouts, strict=True) if chosen(p)]
        return replace(self, params=[p for p, _ in kept], layouts=[layout for _, layout in kept])

    def rounds(self, replicas: int) -> Iterator[list[Asked]]:
        """What it asks for, one round after the other.

        Raises:
            UsageError: it is not known of this stage.
        """
        if isinstance(self.stage, Mean):
            kinds = sorted({p.dtype for p in self.params}, key=str)
            yield [self._mean_of(kind, replicas) for kind in kinds]
        elif isinstance(self.stage, Exchange):
            yield from _exchange_rounds(self.stage, self.params, replicas)
        else:
            raise UsageError(
                f"plan: how {self.stage} exchanges is not known; plan knows recipes of mean and exchange"
            )

    def _mean_of(self, kind: torch.dtype, replicas: int) -> Asked:
        part = self.of(lambda p: p.dtype == kind)
        num_bytes = self.stage.estimate_bytes(part.params, part.layouts, replicas=replicas)
        assert num_bytes is not None
        return Asked(operation="mean", num_bytes=(num_bytes,) * replicas, apart=str(kind))


def _exchange_rounds(stage: Exchange, params: Sequence[Tensor], replicas: int) -> Iterator[list[Asked]]:
    """Shared scales, where there are any; then a gather, or lengths that are agreed on, parts to their owners and the means."""
    shapes = tuple(tuple(p.shape) for p in params)
    number_each = float(4 * (len(shapes) + -len(shapes) % replicas))
    agreed = Asked(operation="mean", num_bytes=(number_each,) * replicas, apart="torch.float32")
    if stage.codec.shares_scale:
        yield [agreed]
    owners = stage.owners(shapes, replicas)
    if owners is None:
        yield [Asked(operation="gather", num_bytes=(float(stage.codec.estimate_bytes(*shapes)),) * replicas)]
        return
    if stage.lengthen and not stage.codec.counts_signs:
        yield [agreed]
    there, back = zip(*owners.part_bytes(shapes, replicas), strict=True)
    yield [Asked(operation="parts", num_bytes=tuple(map(float, there)))]
    # Sums of real signs have other lengths on each owner, which the formula does not show.
    least = 2 if owners.mean_codec is None else 1
    yield [
        Asked(operation="gather", num_bytes=tuple(map(float, back)), apart="of owners", least_messages=least)
    ]


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What a recipe exchanges of a model.

    Args:
        recipe: in textual form.
        passes: the stages that talk of each chain, one behind the other; all chains' travel side by side.
        local: how many steps replicas take alone; None where they synchronize in each.
        inner: what a step costs besides: "polar", "adam", or "plain" where neither is computed.
        buffers: floating ones, that replicas with local steps average.
        fragment_of: with fragments, which one a tensor belongs to. Default: there is one.
    """

    recipe: str
    passes: tuple[tuple[Talk, ...], ...]
    local: LocalSteps | None
    inner: str
    buffers: tuple[Tensor, ...] = ()
    fragment_of: Mapping[Tensor, int] = field(default_factory=dict)

    @property
    def talks(self) -> list[Talk]:
        """Of all chains."""
        return [talk for chain in self.passes for talk in chain]

    @property
    def key(self) -> str:
        """What the processor's part of a synchronization depends on, beside the tensors."""
        stages = sorted({str(talk.stage) for talk in self.talks})
        return f"{'outer' if self.local is not None else self.inner}: {'; '.join(stages)}"

    @property
    def params(self) -> list[Tensor]:
        """All tensors that are exchanged."""
        return [p for talk in self.talks for p in talk.params]

    @property
    def fragments(self) -> range:
        """The fragments; one where the model is not cut."""
        return range(1 if self.local is None else self.local.fragments)

    def params_of(self, fragments: Sequence[int]) -> list[Tensor]:
        """The tensors of these fragments."""
        return [p for p in self.params if self.fragment_of.get(p, 0) in fragments]

    def _fragment(self, index: int) -> list[list[Talk]]:
        of_each = [
            [talk.of(lambda p: self.fragment_of.get(p, 0) == index) for talk in talks]
            for talks in self.passes
        ]
        return [talks for talks in of_each if talks[0].params]

    def rounds(self, replicas: int, fragments: Sequence[int]) -> list[list[Asked]]:
        """What the stages ask for when these fragments travel at once."""
        passes = [
            [asked for talk in talks for asked in talk.rounds(replicas)]
            for index in fragments
            for talks in self._fragment(index)
        ]
        return [
            [asked for of_pass in side_by_side for asked in of_pass]
            for side_by_side in zip_longest(*passes, fillvalue=())
        ]

    def traffic(self, replicas: int, fragments: Sequence[int] | None = None) -> Traffic:
        """When these fragments travel at once, with the handshake before local steps' exchanges.

        Args:
            replicas: that exchange.
            fragments: which. Default: all.
        """
        fragments = self.fragments if fragments is None else fragments
        total = Traffic.none(replicas)
        if self.local is not None:
            total += _gathered((float(Handshake.estimate_bytes(len(self.buffers))),) * replicas)
            if self.buffers and 0 in fragments:
                num_bytes = sum(b.numel() * b.element_size() for b in self.buffers)
                total += _averaged((float(num_bytes),) * replicas)
        for asked in self.rounds(replicas, fragments):
            total += _together(asked, replicas)
        if self.local is not None and self.local.merge == "arrival":
            total += _gathered((float(PROPOSAL_BYTES),) * replicas)
        return total

    def sends(self, steps: int) -> tuple[list[int], list[int]]:
        """How often each fragment is sent in a run of ``steps``, and which are exchanged at once after its last step."""
        if self.local is None:
            return [steps], []
        counted = [sends(self.local, steps, fragment=f) for f in self.fragments]
        return [count for count, _ in counted], [f for f, (_, last) in enumerate(counted) if last < steps]

    def synchronizations(self, steps: int) -> int:
        """How many there are in a run of ``steps``, of all fragments each."""
        return synchronizations(self.local, steps)


def _together(asked: Sequence[Asked], replicas: int) -> Traffic:
    """One round: requests of an operation in one message."""
    total = Traffic.none(replicas)
    for key in dict.fromkeys((a.operation, a.apart) for a in asked):
        alike = [a for a in asked if (a.operation, a.apart) == key]
        joined = JOINED_BYTES * len(alike) if len(alike) > 1 and key[0] != "mean" else 0
        sums = [sum(of_rank) + joined for of_rank in zip(*(a.num_bytes for a in alike), strict=True)]
        traffic, least = OPERATIONS[key[0]](sums), max(a.least_messages for a in alike)
        total += replace(traffic, num_messages=max(traffic.num_messages, least))
    return total


def interval_of(local: LocalSteps) -> int:
    """H, at the beginning of the run where it grows."""
    return local.initial


def sends(local: LocalSteps, steps: int, *, fragment: int = 0) -> tuple[int, int]:
    """How often a fragment is sent in the first ``steps``, and the step of the last time, 0 if there is none.

    >>> sends(LocalSteps(interval=11), 1500), sends(LocalSteps(interval=12, fragments=4), 30, fragment=1)
    ((136, 1496), (3, 30))
    """
    at = first_counts(local)["sent"][fragment]
    if not local.growth:
        count = max((steps - at) // interval_of(local), 0)
        return count, at + count * interval_of(local) if count else 0
    count, last = 0, 0
    while local.growth < 1:
        # The first step t after the last time with t − at ≥ interval + growth · t.
        at = math.ceil((at + interval_of(local)) / (1 - local.growth))
        if at > steps:
            break
        count, last = count + 1, at
    return count, last


def synchronizations(local: LocalSteps | None, steps: int) -> int:
    """How many there are in a run of ``steps`` with a known H; the last step always synchronizes, as in `muonwire train`.

    >>> synchronizations(None, 100), synchronizations(LocalSteps(interval=11), 1500)
    (100, 137)
    """
    if local is None:
        return steps
    count, last = sends(replace(local, fragments=1), steps)
    return count + (last < steps)


def exchanged(recipe: str, module: nn.Module) -> Exchanged:
    """What a recipe exchanges of a model, whose parameters may be on the meta device.

    The recipe makes its groups and chains, and they are taken before an optimizer would make states of them.

    Args:
        recipe: in textual form, such as "one_bit_muon(interval=20)".
        module: its trainable parameters.

    Raises:
        UsageError: no such recipe or option, how a stage exchanges is not known, or there are fewer tensors than fragments.
    """
    name, given = parse_recipe(recipe)
    found, taken = find(name), []

    def optimizer(self: Any, model: nn.Module, groups: Sequence[dict[str, Any]], **rest: Any) -> None:
        taken.append((groups, rest))

    described = type(found.options.__name__, (found.options,), {"optimizer": optimizer})
    options = replace(found, options=described).make_options(given)
    found.build(module, options)
    ((groups, rest),) = taken
    chains = [_as_chain(group.get("chain") or rest["chain"]) for group in groups]
    local: LocalSteps | None = rest.get("local")
    if local is not None and local.adapts:
        raise UsageError(
            f"plan: {recipe} changes its interval while the run goes, so that nothing is known of it before; give interval=NUMBER, "
            "or leave it out, and plan finds the H that keeps exchange below --share"
        )
    passes = _outer_passes(groups) if local is not None else _inner_passes(groups, chains)
    members = [stage for chain in chains for _, stage in chain.members]
    polar = any(stage.orthogonalizes for stage in members)
    adam = any(isinstance(stage, Adam) for stage in members)
    made = Exchanged(
        recipe=recipe,
        passes=tuple(passes),
        local=local,
        inner="polar" if polar else "adam" if adam else "plain",
        buffers=() if local is None else tuple(b for _, b in floating_buffers(module, exclude=())),
    )
    # A stage that is not known is refused here.
    made.rounds(2, [0])
    if local is None or local.fragments == 1:
        return made
    travels = set(made.params)
    in_order = [p for p in module.parameters() if p in travels]
    indices = cut([p.numel() for p in in_order], local.fragments)
    return replace(made, fragment_of=dict(zip(in_order, indices, strict=True)))


def _as_chain(stage: Stage) -> Chain:
    return stage if isinstance(stage, Chain) else Chain([(stage.name, stage)])


def _members_of(group: dict[str, Any]) -> list[tuple[Tensor, MatrixLayout]]:
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    layouts = group.get("layouts") or ["matrix"] * len(params)
    return [(p, MatrixLayout.parse(text)) for p, text in zip(params, layouts, strict=True) if p.requires_grad]


def _talks(chain: Chain, members: Sequence[tuple[Tensor, MatrixLayout]]) -> tuple[Talk, ...]:
    params, layouts = [p for p, _ in members], [layout for _, layout in members]
    return tuple(
        Talk(stage=s, params=params, layouts=layouts) for _, s in chain.members if s.talks and params
    )


def _inner_passes(groups: Sequence[dict[str, Any]], chains: Sequence[Chain]) -> list[tuple[Talk, ...]]:
    made = [_talks(chain, _members_of(group)) for group, chain in zip(groups, chains, strict=True)]
    return [talks for talks in made if talks]


def _outer_passes(groups: Sequence[dict[str, Any]]) -> list[tuple[Talk, ...]]:
    """All parameters with the same outer chain go through it together."""
    alike: dict[str, tuple[Chain, list[tuple[Tensor, MatrixLayout]]]] = {}
    for group in groups:
        for member, outer in zip(_members_of(group), group["outer_chain"], strict=True):
            chain = _as_chain(outer)
            alike.setdefault(str(chain), (chain, []))[1].append(member)
    return [talks for chain, members in alike.values() if (talks := _talks(chain, members))]
