"""A stage's direction at the size of what it was given."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.stages.base import Context, States, Tensors
from muonwire.stages.wrapper import Wrapper


def with_norm_of(matrices: Tensor, given: Tensor) -> Tensor:
    """``matrices`` (..., m, n), each multiplied to the Frobenius norm of the same matrix of ``given``."""
    size: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    wanted: Tensor = torch.linalg.vector_norm(given, dim=(-2, -1), keepdim=True)
    return matrices * (wanted / size.clamp(min=1e-30))


@dataclass(frozen=True, kw_only=True)
class KeepNorm(Wrapper):
    """u ← stage(u) · ‖u‖_F / ‖stage(u)‖_F, for each matrix of the parameter's layout.

    The note multiplies the polar factor by ‖u‖_F without dividing by its own norm, √min(m, n); for matrices of one size that is
    a constant factor on the learning rate.

    Args:
        stage: whose direction is taken; one that talks to no other replica.

    Raises:
        UsageError: the stage talks to the other replicas.

    Source: fix 3 of the note “Why MuonFast fails on vision transformers”.
    """

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        made = self.stage.apply(updates, params, states, context)
        results = []
        for update, result, layout in zip(updates, made, context.layouts, strict=True):
            pairs = zip(layout.split(result), layout.split(update), strict=True)
            results.append(layout.join([with_norm_of(m, u) for m, u in pairs], tuple(update.shape)))
        return results

    def __str__(self) -> str:
        return f"keep_norm({self.stage})"
