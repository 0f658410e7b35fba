"""A stage for large matrices, which leaves small ones as they are."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.stages.base import Context, States, Tensors
from muonwire.stages.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class LargeOnly(Wrapper):
    """u ← stage(u) where min(m, n) ≥ at_least for the matrices of the parameter's layout; the others pass as they are.

    Args:
        stage: for the large ones; one that talks to no other replica.
        at_least: smallest min(m, n) that is large. Default: 128.

    Raises:
        UsageError: the stage talks to the other replicas, or at_least is under 1.

    Source: fix 2 of the note “Why MuonFast fails on vision transformers”.
    """

    at_least: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.at_least < 1:
            raise UsageError(f"large_only: at_least is {self.at_least}; it must be at least 1")

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        are_large = [
            [min(s[-2:]) >= self.at_least for s in layout.shapes(tuple(u.shape))]
            for u, layout in zip(updates, context.layouts, strict=True)
        ]
        large = [i for i, parts in enumerate(are_large) if any(parts)]
        results = list(updates)
        made = self.stage.apply_to_some(large, updates, params, states, context)
        for i, result in zip(large, made, strict=True):
            results[i] = result
            if not all(are_large[i]):
                layout = context.layouts[i]
                both = zip(layout.split(result), layout.split(updates[i]), are_large[i], strict=True)
                parts = [after if is_large else before for after, before, is_large in both]
                results[i] = layout.join(parts, tuple(result.shape))
        return results

    def __str__(self) -> str:
        return f"large_only({self.stage}, at_least={self.at_least})"
