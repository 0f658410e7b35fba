"""Exchange of the difference to a prediction that all replicas share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.host import codes_there
from muonwire.stages.base import Context, Stage, State, States, TalkingStage, Tensors
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Rounds


class Predicted(TalkingStage):
    """u ← p + through(u − p), where p is what ``direction`` makes of the last result, in the best multiple of it.

    p ← c · d with d = direction(u) and c = ⟨u, d⟩/⟨d, d⟩, the least-squares multiple; p is 0 in the first step. Since p comes
    from the result of the exchange alone, all replicas hold the same p without sending it.

    Args:
        through: a stage that exchanges the difference.
        direction: a stage that does not talk, such as Polar.

    Source: approach C of the note “Why Muon and DisTrO conflict”, with a shared prediction. The note predicts with each replica's
    own polar factor, which differs between replicas and would have to be sent.
    """

    def __init__(self, *, through: Stage, direction: Stage) -> None:
        assert not direction.talks
        self.through = through
        self.direction = direction

    @property
    @override
    def multiplies(self) -> bool:
        return self.through.multiplies or self.direction.multiplies

    @property
    @override
    def reads_params(self) -> bool:
        return self.through.reads_params or self.direction.reads_params

    @override
    def init(self, param: Tensor) -> State:
        """The prediction, zero, and the states of both stages."""
        return {
            "prediction": torch.zeros_like(param, memory_format=torch.preserve_format),
            "through": self.through.init(param),
            "direction": self.direction.init(param),
        }

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        """Of both stages."""
        self.through.prepare(state["through"], param, layout)
        self.direction.prepare(state["direction"], param, layout)

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """The prediction and the direction's state, which follow from the exchange's results, and its own shared state."""
        results = self.through.returns_alike(alike=alike)
        return {
            **({"prediction": state["prediction"]} if results else {}),
            "through": self.through.shared_state(state.get("through", {}), alike=alike),
            "direction": self.direction.shared_state(state.get("direction", {}), alike=results),
        }

    @override
    def estimate_bytes(
        self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float | None:
        """Those of the exchange; the prediction costs none."""
        return self.through.estimate_bytes(params, layouts, replicas=replicas)

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        predictions = [s["prediction"] for s in states]
        left = [u - p for u, p in zip(updates, predictions, strict=True)]
        sent = yield from self.through.rounds(left, params, [s["through"] for s in states], context)
        results = [u + p for u, p in zip(sent, predictions, strict=True)]
        directions = self.direction.apply(results, params, [s["direction"] for s in states], context)
        for prediction, result, direction in zip(predictions, results, directions, strict=True):
            wide = torch.float64 if codes_there(direction.device) else direction.dtype
            length = (direction * direction).sum().to(wide)
            overlap = (result * direction).sum().to(wide)
            # A quotient that the host does not wait for.
            share = torch.where(length > 0, overlap / torch.where(length > 0, length, 1), 0)
            torch.mul(direction, share, out=prediction)
        return results

    def __str__(self) -> str:
        return f"predicted({self.direction}: {self.through})"
