"""A chain: named stages, one after the other, which is itself a stage."""

from collections.abc import Sequence

from torch import Tensor

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, State
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds, drive


class Chain(Stage):
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

    def init(self, param: Tensor) -> State:
        """The members' states, by name; members without state are left out."""
        states = {name: stage.init(param) for name, stage in self.members}
        return {name: state for name, state in states.items() if state}

    @property
    def talks(self) -> bool:
        """Whether any member talks to the other replicas."""
        return any(stage.talks for _, stage in self.members)

    @property
    def before_last_talk(self) -> list[tuple[str, Stage]]:
        """The members up to the last that talks, itself included: whose states change while another replica can still fail."""
        talking = [i for i, (_, stage) in enumerate(self.members) if stage.talks]
        return self.members[: talking[-1] + 1] if talking else []

    @property
    def orthogonalizes(self) -> bool:
        """Whether any member does."""
        return any(stage.orthogonalizes for _, stage in self.members)

    def estimate_bytes(
        self, params: Sequence[Tensor], layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float | None:
        """What all members send."""
        total = 0.0
        for _, stage in self.members:
            part = stage.estimate_bytes(params, layouts, replicas=replicas)
            if part is None:
                return None
            total += part
        return total

    def apply(
        self, updates: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> list[Tensor]:
        """All members in turn."""
        (results,) = drive([self.rounds(updates, params, states, context)], context.transport)
        return results

    def rounds(
        self, updates: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> Rounds:
        """All members in turn, their talks one after the other."""
        current = list(updates)
        for name, stage in self.members:
            current = yield from stage.rounds(current, params, [s.get(name, {}) for s in states], context)
        return current

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
