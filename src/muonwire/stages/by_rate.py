"""Multiplying by a power of the learning rate, to move the rate to another place in the chain."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, ElementwiseStage, States, Tensors


@dataclass(frozen=True, kw_only=True)
class ByRate(ElementwiseStage):
    """u ← lr^power · u, and u ← 0 where lr = 0.

    The optimizer multiplies by the rate after the whole chain. A chain of ByRate(power=1), stages, ByRate(power=-1) takes the rate
    before those stages instead: where they are a polar factor, the step does not depend on it.

    Args:
        power: 1 or -1.

    Source: step 2 of MuonFast, newton_schulz(-lr * velocity), in the note “Why MuonFast fails on vision transformers”.
    """

    power: int

    def __post_init__(self) -> None:
        if self.power not in (1, -1):
            raise UsageError(f"by_rate: power is {self.power}; allowed are 1 and -1")

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        factor = context.lr**self.power if context.lr else 0.0
        return [u * factor for u in updates]
