"""Type-II Anderson mixing of a few past steps."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, State, States, Tensors


@dataclass(frozen=True, kw_only=True)
class Anderson(Stage):
    """Type-II Anderson mixing, each tensor by itself, with a regularized fit and a bounded step.

    The plain step x ← x − lr u(x) is a fixed-point iteration with residual u. With the last h differences of the residual and of
    the weights, Δu_i = u_i − u_{i−1} and Δx_i = x_i − x_{i−1} as the columns of ΔU and ΔX:

        λ = ρ · s,  s ← decay · s + (1 − decay) ‖Δu_t‖², divided by 1 − decay^k after k differences
        γ = argmin ‖u − ΔU γ‖² + λ ‖γ‖², that is (ΔUᵀ ΔU + λ I) γ = ΔUᵀ u
        w = u − ΔU γ + ΔX γ / lr
        returns w · min(1, cap ‖u‖ / ‖w‖)

    so that x − lr w = (x − ΔX γ) − lr (u − ΔU γ), Anderson's step with mixing 1. The differences of small batches' gradients are
    mostly noise; λ in proportion to their mean square shrinks the mixing in the same measure. Until there is a difference, and
    where lr = 0, u is returned.

    Args:
        history: h, at least 1. Default: 3.
        regularization: ρ, > 0. Default: 10.
        decay: of the mean square, in [0, 1). Default: 0.9.
        cap: largest ‖w‖ / ‖u‖, > 0. Default: 1.5.

    Source: Anderson (1965); type II: Fang and Saad (2009), section 2; regularized: Scieur et al., arXiv 1606.04133.
    """

    history: int = 3
    regularization: float = 10.0
    decay: float = 0.9
    cap: float = 1.5

    def __post_init__(self) -> None:
        if self.history < 1 or not self.regularization > 0 or not self.cap > 0 or not 0 <= self.decay < 1:
            raise UsageError(
                f"anderson: history is {self.history}, regularization {self.regularization}, decay {self.decay} and cap "
                f"{self.cap}; a history of at least 1, a decay in [0, 1) and positive others are wanted"
            )

    @override
    def init(self, param: Tensor) -> State:
        """The last residual and weight, the differences (the newest last), and what they are regularized by."""
        zeros = torch.zeros_like(param, memory_format=torch.contiguous_format)
        differences = zeros.new_zeros((self.history, *param.shape))
        return {
            "num_differences": -1,
            "mean_square": 0.0,
            "residual": zeros,
            "weight": zeros.clone(),
            "residual_differences": differences,
            "weight_differences": differences.clone(),
        }

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        return [
            self._mixed(u, p.detach(), state, context.lr)
            for u, p, state in zip(updates, params, states, strict=True)
        ]

    def _mixed(self, update: Tensor, weight: Tensor, state: State, lr: float) -> Tensor:
        residuals, weights = state["residual_differences"], state["weight_differences"]
        state["num_differences"] += 1
        count = state["num_differences"]
        if count:
            for kept, now, before in (
                (residuals, update, state["residual"]),
                (weights, weight, state["weight"]),
            ):
                kept.copy_(kept.roll(-1, dims=0))
                kept[-1] = now - before
            square = float(residuals[-1].double().square().sum())
            state["mean_square"] = self.decay * state["mean_square"] + (1 - self.decay) * square
        state["residual"].copy_(update)
        state["weight"].copy_(weight)
        # Differences that are not there yet are zero, and so is their share of the fit.
        penalty = self.regularization * state["mean_square"] / (1 - self.decay**count) if count else 0.0
        if lr == 0 or not penalty > 0:
            return update
        flat = residuals.flatten(1).double()
        gram = flat @ flat.T
        gram.diagonal().add_(penalty)
        coefficients = torch.linalg.solve(gram, flat @ update.flatten().double()).to(update.dtype)
        correction = torch.tensordot(coefficients, weights / lr - residuals, dims=1)
        mixed = update + correction
        size, allowed = torch.linalg.vector_norm(mixed), self.cap * torch.linalg.vector_norm(update)
        bounded: Tensor = mixed * (allowed / size.clamp(min=1e-30)).clamp(max=1.0)
        return bounded
