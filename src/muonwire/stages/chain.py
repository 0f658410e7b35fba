"""A chain: named stages, one after the other, which is itself a stage."""

from collections.abc import Sequence
from functools import cached_property, partial

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, StageInRounds, State, States, Tensors, total_bytes
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds


class Chain(StageInRounds):
    """Named members, applied from left to right, gradient to weight.

    Members that are chains are taken apart, so that chains compose associatively.

    >>> from muonwire.stages import Scale, Sign
    >>> print(chain(Sign(), Scale(kind="rms")))
    sign → scale(kind=rms)
    """

    def __init__(self, members: Sequence[tuple[str, Stage]]) -> None:
        flat: list[tuple[str, Stage]] = []
        for name, stage in members:
            flat += stage.members if isinstance(stage, Chain) else [(name, stage)]
        names = [name for name, _ in flat]
        for name in names:
            if not name or "." in name or names.count(name) > 1:
                raise UsageError(
                    f"chain: member name {name!r} is empty, holds a dot, or is given twice in {names}"
                )
        self.members: list[tuple[str, Stage]] = flat

    @property
    @override
    def elementwise(self) -> bool:
        """Where all members are."""
        return all(stage.elementwise for _, stage in self.members)

    @property
    @override
    def reads_params(self) -> bool:
        """Where any member does."""
        return any(stage.reads_params for _, stage in self.members)

    @override
    def init(self, param: Tensor) -> State:
        """The members' states, by name; members without state are left out."""
        states = {name: stage.init(param) for name, stage in self.members}
        return {name: state for name, state in states.items() if state}

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        """Of the members; those whose state is empty so far get one."""
        for name, stage in self.members:
            of_member = state.get(name, {})
            stage.prepare(of_member, param, layout)
            if of_member:
                state[name] = of_member

    @property
    @override
    def talks(self) -> bool:
        return any(stage.talks for _, stage in self.members)

    @property
    def before_last_talk(self) -> list[tuple[str, Stage]]:
        """The members up to and with the last that talks, whose states change while another replica can still fail."""
        talking = [i for i, (_, stage) in enumerate(self.members) if stage.talks]
        return self.members[: talking[-1] + 1] if talking else []

    @property
    @override
    def orthogonalizes(self) -> bool:
        return any(stage.orthogonalizes for _, stage in self.members)

    @property
    @override
    def multiplies(self) -> bool:
        return any(stage.multiplies for _, stage in self.members)

    @override
    def returns_alike(self, *, alike: bool) -> bool:
        for _, stage in self.members:
            alike = stage.returns_alike(alike=alike)
        return alike

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """The members' shared states, by name: whole behind a member that makes the updates alike."""
        shared = {}
        for name, stage in self.members:
            if name in state:
                shared[name] = stage.shared_state(state[name], alike=alike)
            alike = stage.returns_alike(alike=alike)
        return {name: part for name, part in shared.items() if part}

    @override
    def estimate_bytes(
        self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float | None:
        """The sum over the members."""
        return total_bytes(
            stage.estimate_bytes(params, layouts, replicas=replicas) for _, stage in self.members
        )

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        """All members in turn; what all replicas would compute alike, replicas of one process compute once."""
        current, alike = list(updates), False
        for name, stage in self.members:
            own = [s.get(name, {}) for s in states]
            if alike and context.names and not (stage.talks or stage.reads_params or any(own)):
                key = (self._text, name, context.step, *context.names)
                apply = partial(stage.apply, current, params, own, context)
                current = list(context.transport.once(key, apply))
            else:
                current = yield from stage.rounds(current, params, own, context)
            alike = stage.returns_alike(alike=alike)
        return current

    @cached_property
    def _text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return " → ".join(str(stage) for _, stage in self.members)


def chain(*stages: Stage) -> Chain:
    """A chain whose members are named by what they are; a second one of a kind is called ``name_2``."""
    members: list[tuple[str, Stage]] = []
    flat = [
        member
        for stage in stages
        for member in (stage.members if isinstance(stage, Chain) else [(stage.name, stage)])
    ]
    for name, stage in flat:
        taken = [n for n, _ in members]
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name}_{number}", number + 1
        members.append((unique, stage))
    return Chain(members)


def named_chain(*members: tuple[str, Stage]) -> Chain:
    """A chain with names of your own, under which the states are kept."""
    return Chain(members)
