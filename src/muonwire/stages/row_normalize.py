"""NorMuon's normalization of rows."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, State, States, Tensors
from muonwire.stages.keep_norm import with_norm_of
from muonwire.stages.layout import MatrixLayout


@dataclass(frozen=True, kw_only=True)
class RowNormalize(Stage):
    """v ← β₂ v + (1 − β₂) mean over columns of u²; û = u / (√v + ε) by rows; returns û ‖u‖_F / ‖û‖_F.

    After a polar factor it gives every neuron a step of about the same size, at the factor's own norm.

    Args:
        beta2: in [0, 1). Default: 0.95.
        eps: > 0. Default: 1e-8.

    Source: Li et al., "NorMuon", arXiv 2510.05491, algorithm 1.
    """

    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not (0 <= self.beta2 < 1 and self.eps > 0):
            raise UsageError(
                f"row_normalize: beta2 is {self.beta2} and eps {self.eps}; beta2 lies in [0, 1), eps is positive"
            )

    @property
    @override
    def reads_params(self) -> bool:
        return False

    @override
    def init(self, param: Tensor) -> State:
        """The number of steps; ``prepare`` adds the mean squares of the rows."""
        return {"step": 0}

    @override
    def prepare(self, state: State, param: Tensor, layout: MatrixLayout) -> None:
        """The mean squares of the rows, zero: one tensor, the rows of unequal parts one behind another."""
        *_, (*lead, _, _) = shapes = layout.shapes(tuple(param.shape))
        state["row_squares"] = param.new_zeros((*lead, sum(shape[-2] for shape in shapes), 1))

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        results = []
        for update, state, layout in zip(updates, states, context.layouts, strict=True):
            state["step"] += 1
            parts = layout.split(update)
            squares = torch.cat([part.square().mean(dim=-1, keepdim=True) for part in parts], dim=-2)
            if "row_squares" not in state:
                self.prepare(state, update, layout)
            rows: Tensor = state["row_squares"].lerp_(squares, 1 - self.beta2)
            sizes = [part.shape[-2] for part in parts]
            normalized = [
                with_norm_of(part / (its_rows.sqrt() + self.eps), part)
                for part, its_rows in zip(parts, torch.split(rows, sizes, dim=-2), strict=True)
            ]
            results.append(layout.join(normalized, tuple(update.shape)))
        return results
