"""One chain's way through a step: what goes in, what its states were, and what its updates move."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from muonwire.stages.base import Context, State
from muonwire.stages.chain import Chain
from muonwire.stages.rounds import Rounds


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The tensors that go through one chain in one step.

    Args:
        chain: what they go through.
        weights: what the updates move, and what the stages see as parameters.
        updates: what goes in, one for each weight and of its dtype, at least float32.
        states: of the chain's members, one for each weight.
        context: what the stages may know besides.
        weight_decay: decoupled, times the learning rate.
    """

    chain: Chain
    weights: Sequence[Tensor]
    updates: Sequence[Tensor]
    states: Sequence[State]
    context: Context
    weight_decay: float = 0.0

    def rounds(self) -> Rounds:
        """The chain's talks; see Stage.rounds."""
        return self.chain.rounds(self.updates, self.weights, self.states, self.context)

    def move(self, updates: Sequence[Tensor]) -> None:
        """w ← (1 − lr · weight_decay) w − lr · u, with what came out of the chain."""
        lr = self.context.lr
        for weight, update in zip(self.weights, updates, strict=True):
            if self.weight_decay:
                weight.mul_(1 - lr * self.weight_decay)
            weight.add_(update.to(weight.dtype), alpha=-lr)


@contextmanager
def restored_on_error(passes: Sequence[Pass]) -> Iterator[None]:
    """Whatever is raised within, the states are what they were before.

    Kept are the states of members up to the last that talks: what comes after it runs only when nothing can fail any more.
    """
    kept = [
        (state, {name: copied(state[name]) for name in p.chain.before_last_talk if name in state})
        for p in passes
        for state in p.states
    ]
    try:
        yield
    except BaseException:
        for state, before in kept:
            state.update(before)
        raise


def copied(state: State) -> State:
    """A copy of nested states that shares no tensor with them."""
    return {
        key: copied(value)
        if isinstance(value, dict)
        else value.detach().clone()
        if isinstance(value, Tensor)
        else value
        for key, value in state.items()
    }
