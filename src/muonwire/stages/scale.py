"""Scales by shape: one learning rate for matrices of all sizes."""

import math
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, Stage, States, Tensors


def shape_scale(kind: str, num_rows: int, num_columns: int) -> float:
    """The factor for an m × n matrix: spectral √max(1, m/n), rms 0.2 √max(m, n), small (min(m, n)/256)², none 1.

    >>> shape_scale("rms", 64, 256), shape_scale("spectral", 256, 64)
    (3.2, 2.0)
    """
    if kind == "spectral":
        return math.sqrt(max(1.0, num_rows / num_columns))
    if kind == "rms":
        return 0.2 * math.sqrt(max(num_rows, num_columns))
    if kind == "small":
        return (min(num_rows, num_columns) / 256) ** 2
    return 1.0


@dataclass(frozen=True, kw_only=True)
class Scale(Stage):
    """u ← s(m, n) u for the matrices of the parameter's layout.

    "spectral": √max(1, m/n), which bounds the change of the layer's output (Jordan, 2024);
    "rms": 0.2 √max(m, n), which gives a polar factor the size of an Adam update, so that one learning rate serves both
    (Liu et al., "Muon is scalable for LLM training", arXiv 2502.16982, section 2.2);
    "small": (min(m, n)/256)², which shrinks the steps of small matrices (the dimension-aware scaling of the note
    “Why MuonFast fails on vision transformers”);
    "none": 1, for tensors of any shape.

    Args:
        kind: see above. Default: "rms".
        factor: multiplies s; with "rms", 5 gives a polar factor entries of root mean square 1, a sign's. Default: 1.
    """

    kind: str = "rms"
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("spectral", "rms", "small", "none"):
            raise UsageError(f"scale: kind is {self.kind!r}; allowed are spectral, rms, small and none")
        if not self.factor > 0:
            raise UsageError(f"scale: factor is {self.factor}; it must be positive")

    @property
    @override
    def elementwise(self) -> bool:
        """Of one factor for tensors of all shapes."""
        return self.kind == "none"

    @property
    @override
    def reads_params(self) -> bool:
        return False

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        if self.kind == "none":
            return [u * self.factor for u in updates]
        results = []
        for update, layout in zip(updates, context.layouts, strict=True):
            scales = [
                self.factor * shape_scale(self.kind, s[-2], s[-1]) for s in layout.shapes(tuple(update.shape))
            ]
            if len(set(scales)) == 1:
                results.append(update * scales[0])
            else:
                scaled = [part * s for part, s in zip(layout.split(update), scales, strict=True)]
                results.append(layout.join(scaled, tuple(update.shape)))
        return results

    def __str__(self) -> str:
        return f"scale(kind={self.kind}{'' if self.factor == 1 else f', factor={self.factor:g}'})"
