"""Orthogonalization."""

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.polar import METHODS, SCHEDULES, polar_list
from muonwire.stages.base import Context, Stage, States, Tensors


@dataclass(frozen=True, kw_only=True)
class Polar(Stage):
    """u ← polar factor of u, for each matrix of the parameter's layout.

    Args:
        method: as ``muonwire.polar.polar`` takes it. Default: "auto".
        schedule: name of a schedule of coefficients. Default: the method's own.
        dtype: dtype of the products. Default: what the processor multiplies fastest, on which the optimizer's replicas agree
            where they must round alike; float32 for the exact methods.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    method: str = "auto"
    schedule: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"polar: method is {self.method!r}; allowed are {', '.join(METHODS)}")
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise UsageError(f"polar: schedule is {self.schedule!r}; allowed are {', '.join(SCHEDULES)}")
        if self.dtype not in (None, "bfloat16", "float16", "float32", "float64"):
            raise UsageError(
                f"polar: dtype is {self.dtype!r}; allowed are bfloat16, float16, float32 and float64"
            )

    @property
    @override
    def orthogonalizes(self) -> bool:
        return True

    @property
    @override
    def reads_params(self) -> bool:
        return False

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        split = [layout.split(u) for u, layout in zip(updates, context.layouts, strict=True)]
        factors = iter(
            polar_list(
                [part for parts in split for part in parts],
                method=self.method,
                schedule=self.schedule,
                dtype=None if self.dtype is None else getattr(torch, self.dtype),
                # A training loop sees what is not finite in the loss, on all replicas in the same step.
                nonfinite="propagate",
                processor=context.processor,
            )
        )
        return [
            layout.join([next(factors) for _ in parts], tuple(u.shape))
            for u, parts, layout in zip(updates, split, context.layouts, strict=True)
        ]

    def __str__(self) -> str:
        return f"polar({', '.join(x for x in (self.method, self.schedule, self.dtype) if x)})"
