"""The results of an exchange, applied one step later."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.stages.base import Context, Stage, State, States, TalkingStage, Tensors
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds


class Delayed(TalkingStage):
    """u ← what ``through`` made of the step before; zero in the first step.

    On a slow link the messages of a step can then travel while the next gradient is computed. Rounds and bytes are those of
    ``through``.

    Args:
        through: a stage that exchanges.

    Source: Psyche, whose replicas apply a round's results in the next one.
    """

    def __init__(self, *, through: Stage) -> None:
        self.through = through

    @property
    @override
    def replaces_states(self) -> bool:
        return self.through.replaces_states

    @property
    @override
    def multiplies(self) -> bool:
        return self.through.multiplies

    @property
    @override
    def reads_params(self) -> bool:
        return self.through.reads_params

    @override
    def init(self, param: Tensor) -> State:
        """The result for the next step, zero, and the state of the stage."""
        waiting = torch.zeros_like(param, memory_format=torch.preserve_format)
        return {"waiting": waiting, "through": self.through.init(param)}

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        """Of the stage."""
        self.through.prepare(state["through"], param, layout)

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """The result that waits, which all replicas have received, and the shared state of the stage."""
        waiting = {"waiting": state["waiting"]} if self.through.returns_alike(alike=alike) else {}
        return {**waiting, "through": self.through.shared_state(state.get("through", {}), alike=alike)}

    @override
    def estimate_bytes(
        self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float | None:
        return self.through.estimate_bytes(params, layouts, replicas=replicas)

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        results = yield from self.through.rounds(updates, params, [s["through"] for s in states], context)
        late: list[Tensor] = [s["waiting"] for s in states]
        for state, result in zip(states, results, strict=True):
            # A result may be a state of ``through``, which the next round moves.
            state["waiting"] = result.clone()
        return late

    def __str__(self) -> str:
        return f"delayed({self.through})"
