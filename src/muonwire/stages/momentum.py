"""Momentum."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, ElementwiseStage, State, States, Tensors


@dataclass(frozen=True, kw_only=True)
class Momentum(ElementwiseStage):
    """Momentum in its two usual forms, with or without Nesterov's look-ahead.

    "ema": v ← β v + (1 − β) u, returns v, or (1 − β) u + β v with Nesterov;
    "heavy_ball": v ← β v + u, returns v, or u + β v with Nesterov.

    The two differ by the factor 1 − β only, which a polar factor or a sign after it does not see.

    Args:
        beta: in [0, 1). Default: 0.95.
        nesterov: look ahead. Default: True.
        form: "ema" (default) or "heavy_ball".

    Source: Polyak (1964); Nesterov (1983); the ema form with Nesterov as in torch.optim.Muon.
    """

    beta: float = 0.95
    nesterov: bool = True
    form: str = "ema"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError(f"momentum: beta is {self.beta}; it must lie in [0, 1)")
        if self.form not in ("ema", "heavy_ball"):
            raise UsageError(f"momentum: form is {self.form!r}; allowed are ema and heavy_ball")

    @override
    def init(self, param: Tensor) -> State:
        """The buffer v, zero."""
        return {"buffer": torch.zeros_like(param, memory_format=torch.preserve_format)}

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        results = []
        for update, state in zip(updates, states, strict=True):
            buffer: Tensor = state["buffer"]
            if self.form == "ema":
                buffer.lerp_(update, 1 - self.beta)
                results.append(update.lerp(buffer, self.beta) if self.nesterov else buffer)
            else:
                buffer.mul_(self.beta).add_(update)
                results.append(update.add(buffer, alpha=self.beta) if self.nesterov else buffer)
        return results
