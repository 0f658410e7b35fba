"""What a recipe exchanges of a model: the stages that talk, on which tensors, how often, and the bytes of it each way."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.settings import LocalSteps
from muonwire.recipes import find, parse_recipe
from muonwire.stages import Adam, Chain, Exchange, Mean, Stage
from muonwire.stages.layout import MatrixLayout
from muonwire.transport.header import HEADER

# Before each of several payloads in one message stands its length.
LENGTH_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One synchronization of one replica; counts are expected ones.

    Args:
        egress_bytes: that leave it, a copy for each peer, headers included.
        received_bytes: that come to it.
        num_messages: that wait for one another.
    """

    egress_bytes: float = 0.0
    received_bytes: float = 0.0
    num_messages: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            egress_bytes=self.egress_bytes + other.egress_bytes,
            received_bytes=self.received_bytes + other.received_bytes,
            num_messages=self.num_messages + other.num_messages,
        )


def _gathered(num_bytes: float, replicas: int) -> Traffic:
    """A payload to every peer, and one from each: (R − 1)(P + header) both ways."""
    copies = (replicas - 1) * (num_bytes + HEADER.size)
    return Traffic(egress_bytes=copies, received_bytes=copies, num_messages=1)


def _averaged(num_bytes: float, replicas: int) -> Traffic:
    """Replica j averages the j-th part and sends it to all: 2 (R − 1)(P / R + header) both ways."""
    parts = 2 * (replicas - 1) * (math.ceil(num_bytes / replicas) + HEADER.size)
    return Traffic(egress_bytes=parts, received_bytes=parts, num_messages=2)


# By how the tensors of a stage travel: the traffic of what one replica sends of its own. A new way to take a mean is one more line
# here, and the name that ``way_of`` gives its stages.
WAYS: dict[str, Callable[[float, int], Traffic]] = {"gather": _gathered, "mean": _averaged}


def way_of(stage: Stage) -> str:
    """How the tensors of a stage that talks travel: a key of WAYS.

    Raises:
        UsageError: it is not known of this stage.
    """
    # An exchange says who averages where there is a choice.
    way = "mean" if isinstance(stage, Mean) else getattr(stage, "means", "gather")
    if isinstance(stage, Mean | Exchange) and way in WAYS:
        return str(way)
    raise UsageError(
        f"plan: how {stage} exchanges is not known; plan knows recipes of mean and exchange, that travel as {' or '.join(WAYS)}"
    )


@dataclass(frozen=True, kw_only=True)
class Talk:
    """A stage that talks, and the tensors that go through it in one message."""

    stage: Stage
    params: Sequence[Tensor]
    layouts: Sequence[MatrixLayout]

    def sent_bytes(self, replicas: int) -> float:
        """What a replica sends of its own, by the stage's formula, without headers."""
        sent = self.stage.estimate_bytes(self.params, self.layouts, replicas=replicas)
        assert sent is not None
        return sent


@dataclass(frozen=True, kw_only=True)
class Exchanged:
    """What a recipe exchanges of a model.

    Args:
        recipe: in textual form.
        talks: in each synchronization.
        local: how many steps replicas take alone; None where they synchronize in each.
        inner: what a step costs besides: "polar", "adam", or "plain" where neither is computed.
    """

    recipe: str
    talks: tuple[Talk, ...]
    local: LocalSteps | None
    inner: str

    @property
    def key(self) -> str:
        """What the processor's part of a synchronization depends on, beside the tensors."""
        stages = sorted({str(talk.stage) for talk in self.talks})
        return f"{'outer' if self.local is not None else self.inner}: {'; '.join(stages)}"

    @property
    def params(self) -> list[Tensor]:
        """All tensors that are exchanged."""
        return [p for talk in self.talks for p in talk.params]

    def traffic(self, replicas: int) -> Traffic:
        """Of one synchronization: the tensors of each way travel together, those of each dtype apart in a mean."""
        total = Traffic()
        for way, count in WAYS.items():
            talks = [talk for talk in self.talks if way_of(talk.stage) == way]
            kinds = {p.dtype for talk in talks for p in talk.params} if way == "mean" else {None}
            for kind in sorted(kinds, key=str):
                of_kind = [
                    replace(t, params=[p for p in t.params if kind is None or p.dtype == kind]) for t in talks
                ]
                if of_kind:
                    lengths = LENGTH_BYTES * len(of_kind) if way == "gather" and len(of_kind) > 1 else 0
                    total += count(sum(t.sent_bytes(replicas) for t in of_kind) + lengths, replicas)
        return total

    def synchronizations(self, steps: int) -> int:
        """How many there are in a run of ``steps``."""
        return synchronizations(self.local, steps)


def synchronizations(local: LocalSteps | None, steps: int) -> int:
    """How many there are in a run of ``steps`` with a known H; the last step always synchronizes, as in `muonwire train`.

    >>> synchronizations(None, 100), synchronizations(LocalSteps(interval=11), 1500)
    (100, 137)
    """
    if local is None:
        return steps
    count, at = 0, 0
    while at < steps:
        # The first step t after the last synchronization with t − at ≥ interval + growth · t.
        at = math.ceil((at + local.initial) / (1 - local.growth)) if local.growth < 1 else steps
        count += 1
    return count


def exchanged(recipe: str, module: nn.Module) -> Exchanged:
    """What a recipe exchanges of a model, whose parameters may be on the meta device.

    The recipe makes its groups and chains, and they are taken before an optimizer would make states of them.

    Args:
        recipe: in textual form, such as "one_bit_muon(interval=20)".
        module: its trainable parameters.

    Raises:
        UsageError: no such recipe or option, or how a stage exchanges is not known.
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
    made = _outer_talks(groups) if local is not None else _inner_talks(groups, chains)
    for talk in made:
        way_of(talk.stage)
    members = [stage for chain in chains for _, stage in chain.members]
    polar = any(stage.orthogonalizes for stage in members)
    adam = any(isinstance(stage, Adam) for stage in members)
    return Exchanged(
        recipe=recipe,
        talks=tuple(made),
        local=local,
        inner="polar" if polar else "adam" if adam else "plain",
    )


def _as_chain(stage: Stage) -> Chain:
    return stage if isinstance(stage, Chain) else Chain([(stage.name, stage)])


def _members_of(group: dict[str, Any]) -> list[tuple[Tensor, MatrixLayout]]:
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    layouts = group.get("layouts") or ["matrix"] * len(params)
    return [(p, MatrixLayout.parse(text)) for p, text in zip(params, layouts, strict=True) if p.requires_grad]


def _talks(chain: Chain, members: Sequence[tuple[Tensor, MatrixLayout]]) -> list[Talk]:
    params, layouts = [p for p, _ in members], [layout for _, layout in members]
    return [Talk(stage=s, params=params, layouts=layouts) for _, s in chain.members if s.talks and params]


def _inner_talks(groups: Sequence[dict[str, Any]], chains: Sequence[Chain]) -> list[Talk]:
    return [
        talk
        for group, chain in zip(groups, chains, strict=True)
        for talk in _talks(chain, _members_of(group))
    ]


def _outer_talks(groups: Sequence[dict[str, Any]]) -> list[Talk]:
    """All parameters with the same outer chain go through it together."""
    alike: dict[str, tuple[Chain, list[tuple[Tensor, MatrixLayout]]]] = {}
    for group in groups:
        for member, outer in zip(_members_of(group), group["outer_chain"], strict=True):
            chain = _as_chain(outer)
            alike.setdefault(str(chain), (chain, []))[1].append(member)
    return [talk for chain, members in alike.values() for talk in _talks(chain, members)]
