"""The contract of a stage, and of the chain that stages make.

A stage takes the list of updates of one parameter group and returns the list that the next stage sees. The first stage sees
the gradients; what the last one returns, times the learning rate, is subtracted from the weights. A stage never writes to an
update it was given; what it returns may alias its own state.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.polar import Processor
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.rounds import Reply, Request, Rounds, drive
from muonwire.transport.base import Transport

# Tensors and numbers by name; a chain nests its members' states under their names.
State = dict[str, Any]
# Of one group, an entry for each of its parameters.
Tensors = Sequence[Tensor]
States = Sequence[State]
# Called with what was to be sent of a tensor and with what of it the feedback keeps; it changes neither.
Watch = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a stage may know besides the updates.

    Args:
        lr: the group's learning rate in this step.
        step: how many steps the group has taken, this one included (the first is 1).
        transport: the way to the other replicas.
        layouts: how each parameter is seen as matrices, in the order of the parameters.
        names: of the parameters, in the same order, for messages. Default: none are known.
        dtypes: of the parameters, in the same order, in which a dense mean travels; updates and states are wider where these
            have 16 bits. Default: those of the updates.
        indices: of the parameters among those of their group's step, from which codecs make random numbers, where a process treats
            a part of them. Default: 0, 1, 2 and so on.
        watch: called by stages with feedback for each tensor, with what was to be sent and what is kept of it. Default: none.
        processor: the class whose dtype and sizes polar factors follow, the same on all replicas that must round alike.
            Default: that of the tensors' device.
    """

    lr: float
    step: int
    transport: Transport
    layouts: Sequence[MatrixLayout]
    names: Sequence[str] = ()
    dtypes: Sequence[torch.dtype] = ()
    indices: Sequence[int] = ()
    watch: Watch | None = None
    processor: Processor | None = None

    def place(self, index: int) -> int:
        """Where parameter ``index`` of this list stands in its group."""
        return self.indices[index] if self.indices else index

    def of_some(self, chosen: Sequence[int]) -> "Context":
        """That of some of the parameters."""
        return replace(
            self,
            layouts=_some(self.layouts, chosen),
            names=_some(self.names, chosen),
            dtypes=_some(self.dtypes, chosen),
            indices=[self.place(i) for i in chosen],
        )


class Stage(ABC):
    """One step of a chain. Stages are immutable: all that changes lives in the parameters' states."""

    @property
    def name(self) -> str:
        """How a chain names this member by default: the class's name in snake case."""
        # A run of capitals is one word: PowerSGD is power_sgd.
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", type(self).__name__)
        return words.lower().lstrip("_")

    def init(self, param: Tensor) -> State:
        """The state of one parameter before its first step."""
        return {}

    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:  # noqa: B027 - most stages have nothing to add
        """Add to the state that ``init`` made what depends on the parameter's layout, so that a checkpoint finds its place.

        Args:
            state: of the parameter, before its first step.
            param: for shape, dtype and device; it has no values.
            layout: of the parameter.
        """

    @property
    def talks(self) -> bool:
        """Whether the stage talks to the other replicas."""
        return False

    @property
    def elementwise(self) -> bool:
        """Whether each entry of what the stage returns follows from the same entry of what it is given, kept and weighed by alone.

        Such a stage works on the shards of sharded weights as it does on the whole, its states sharded like them. For any other
        stage whole tensors are made of shards, each on one process of the replica, where the stage must treat it by itself.
        """
        return False

    @property
    def reads_params(self) -> bool:
        """Whether the stage reads the values of the parameters, and not only their shapes, dtypes and devices.

        Where weights are sharded, whole ones are made for it if it does.
        """
        return True

    @property
    def replaces_states(self) -> bool:
        """Whether the stage puts new tensors into its states and writes into none that were there before the step.

        Then a step that fails is undone without copies of them.
        """
        return False

    @property
    def needs_same_replicas(self) -> str:
        """Why the stage is wrong where replicas come and go; empty where it is not."""
        return ""

    @property
    def orthogonalizes(self) -> bool:
        """Whether every replica computes polar factors in this stage, whose rounding follows from the processor."""
        return False

    @property
    def multiplies(self) -> bool:
        """Whether every replica multiplies matrices here, which machines round differently. Default: for polar factors."""
        return self.orthogonalizes

    def returns_alike(self, *, alike: bool) -> bool:
        """Whether the updates that the stage returns are the same on all replicas.

        Args:
            alike: whether those that it is given are.
        """
        return alike

    def shared_state(self, state: State, *, alike: bool) -> State:
        """The part of a parameter's ``state`` that is the same on all replicas; the rest is this replica's own.

        A replica that has lost its state gets the shared part from another one, and begins anew with the rest.

        Args:
            state: as ``init`` made it and steps moved it.
            alike: whether the updates that the stage is given are the same on all replicas.
        """
        return state if alike else {}

    def estimate_bytes(
        self, params: Tensors, layouts: Sequence[MatrixLayout], *, replicas: int
    ) -> float | None:
        """Bytes that each of ``replicas`` sends for these parameters in a step, on average, without the messages' frames.

        None where a stage that talks has no formula.
        """
        return None if self.talks else 0.0

    @abstractmethod
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """The updates that the next stage sees, one for each parameter."""

    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        """``apply`` as a generator: it yields each request to the other replicas, is sent the reply, and returns the updates.

        The caller carries the requests out, and can put those of several groups into one message.
        """
        return self.apply(updates, params, states, context)
        yield  # never reached; it makes this a generator

    def apply_to_some(
        self, chosen: Sequence[int], updates: Tensors, params: Tensors, states: States, context: Context
    ) -> list[Tensor]:
        """The updates of these tensors of the group alone, from a stage that does not talk and treats each by itself."""
        if not chosen:
            return []
        updates, params, states = (_some(values, chosen) for values in (updates, params, states))
        return self.apply(updates, params, states, context.of_some(chosen))

    def __str__(self) -> str:
        options = [f"{f.name}={getattr(self, f.name)}" for f in fields(self)]  # type: ignore[arg-type]
        return f"{self.name}({', '.join(options)})"


def _some(values: Sequence[Any], chosen: Sequence[int]) -> list[Any]:
    """The chosen of the values, if there are any values."""
    return [values[i] for i in chosen] if values else []


def total_bytes(estimates: Iterable[float | None]) -> float | None:
    """The sum of what several stages send; None where one of them has no formula."""
    known = list(estimates)
    return None if None in known else float(sum(filter(None, known)))


class ElementwiseStage(Stage):
    """A stage that works entry by entry, and does not read the parameters."""

    @property
    @override
    def elementwise(self) -> bool:
        return True

    @property
    @override
    def reads_params(self) -> bool:
        return False


class StageInRounds(Stage):
    """A stage that is written as ``rounds``, of which ``apply`` follows."""

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """All rounds, with messages of their own."""
        (results,) = drive([self.rounds(updates, params, states, context)], context.transport)
        return results


class TalkingStage(StageInRounds):
    """A stage that talks to the other replicas: in one round, with ``send`` and ``receive``, or in several, with ``rounds``."""

    @property
    @override
    def talks(self) -> bool:
        return True

    @override
    def returns_alike(self, *, alike: bool) -> bool:
        """True, unless a stage overrides it: what all replicas have sent makes the same updates on all of them."""
        return True

    @override
    def shared_state(self, state: State, *, alike: bool) -> State:
        """All of it where the updates are alike; otherwise a stage with a state overrides it.

        Raises:
            UsageError: a stage with a state that does not say what of it is shared.
        """
        if state and not alike:
            raise UsageError(
                f"{self.name}: the stage keeps {', '.join(state)} and does not say what of it is the same on all replicas; "
                "override shared_state"
            )
        return state

    @override
    def rounds(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Rounds:
        """One round of ``send`` and ``receive``."""
        reply = yield self.send(updates, params, states, context)
        return self.receive(reply, params, states, context)

    def send(self, updates: Tensors, params: Tensors, states: States, context: Context) -> Request:
        """The request of the one round."""
        raise TypeError(f"{self.name}: a stage that talks overrides rounds, or send and receive")

    def receive(self, reply: Reply, params: Tensors, states: States, context: Context) -> list[Tensor]:
        """The updates that the next stage sees, made of the reply of the one round."""
        raise TypeError(f"{self.name}: a stage that talks overrides rounds, or send and receive")
