"""Adam."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, ElementwiseStage, State, States, Tensors


@dataclass(frozen=True, kw_only=True)
class Adam(ElementwiseStage):
    """m ← β₁ m + (1 − β₁) u; v ← β₂ v + (1 − β₂) u²; returns m̂ / (√v̂ + ε), with m̂ = m/(1 − β₁ᵗ), v̂ = v/(1 − β₂ᵗ).

    With the optimizer's decoupled weight decay this is AdamW.

    Args:
        beta1, beta2: in [0, 1). Defaults: 0.9, 0.95.
        eps: > 0. Default: 1e-8.

    Source: Kingma and Ba, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter, arXiv 1711.05101.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise UsageError(
                f"adam: {self.beta1=}, {self.beta2=}, {self.eps=}; betas lie in [0, 1), eps is positive"
            )

    @override
    def init(self, param: Tensor) -> State:
        """Both moments, zero, and the number of steps taken (a parameter may miss some)."""
        zeros = torch.zeros_like(param, memory_format=torch.preserve_format)
        return {"step": 0, "mean": zeros, "mean_square": zeros.clone()}

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        results = []
        # Tensor by tensor, so that what one needs lies in the caches, and few temporaries are there at a time.
        for update, state in zip(updates, states, strict=True):
            state["step"] += 1
            mean: Tensor = state["mean"].lerp_(update, 1 - self.beta1)
            square: Tensor = (
                state["mean_square"].mul_(self.beta2).addcmul_(update, update, value=1 - self.beta2)
            )
            first, second = 1 - self.beta1 ** state["step"], (1 - self.beta2 ** state["step"]) ** 0.5
            # Both corrections go into the denominator: one pass over the tensor in the place of three.
            result = square.sqrt()
            eps = torch.full((), self.eps * first, dtype=result.dtype, device=result.device)
            torch.add(eps, result, alpha=first / second, out=result)
            results.append(torch.div(mean, result, out=result))
        return results
