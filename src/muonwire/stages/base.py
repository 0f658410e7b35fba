"""The contract of a stage, and of the chain that stages make.

A stage takes the list of updates of one parameter group and returns the list that the next stage sees. The first stage sees
the gradients; what the last one returns, times the learning rate, is subtracted from the weights. A stage never writes to an
update it was given; what it returns may alias its own state.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from muonwire.exchange.base import Exchange
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request, perform

# Tensors and numbers by name; a chain nests its members' states under their names.
State = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage may know besides the updates.

    Args:
        lr: the group's learning rate in this step.
        step: how many steps the group has taken, this one included (the first is 1).
        exchange: the way to the other replicas.
        layouts: how each parameter is seen as matrices, in the order of the parameters.
        names: of the parameters, in the same order, for messages. Default: none are known.
    """

    lr: float
    step: int
    exchange: Exchange
    layouts: Sequence[MatrixLayout]
    names: Sequence[str] = ()


class Stage(ABC):
    """One step of a chain. Stages are immutable: all that changes lives in the parameters' states."""

    @property
    def name(self) -> str:
        """How a chain names this member by default: the class's name in snake case."""
        return "".join("_" + c.lower() if c.isupper() else c for c in type(self).__name__).lstrip("_")

    def init(self, param: Tensor) -> State:
        """The state of one parameter before its first step."""
        return {}

    @abstractmethod
    def apply(
        self, updates: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> list[Tensor]:
        """The updates that the next stage sees, one for each parameter."""

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]  # type: ignore[arg-type]
        return f"{self.name}({', '.join(options)})"


class ExchangeStage(Stage):
    """A stage that talks to the other replicas, in two halves, so that all groups of a step share one message."""

    @abstractmethod
    def send(
        self, updates: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> Request:
        """The first half: what goes out."""

    @abstractmethod
    def receive(
        self, reply: Reply, params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> list[Tensor]:
        """The second half: the updates that the next stage sees."""

    def apply(
        self, updates: Sequence[Tensor], params: Sequence[Tensor], states: Sequence[State], context: Context
    ) -> list[Tensor]:
        """Both halves, with a message of its own."""
        (reply,) = perform([self.send(updates, params, states, context)], context.exchange)
        return self.receive(reply, params, states, context)
