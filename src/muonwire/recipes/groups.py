"""The parameter groups that recipes make of a model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.routing import Route
from muonwire.stages import Stage


def trainable(model: nn.Module) -> list[tuple[str, Tensor]]:
    """All trainable parameters with their names, tied ones once.

    Raises:
        UsageError: there are none.
    """
    named: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise UsageError(f"recipe: {type(model).__name__} has no trainable parameter")
    return named


def named_group(name: str, named: Sequence[tuple[str, Tensor]], **extra: Any) -> dict[str, Any]:
    """A parameter group with names for messages."""
    return {"name": name, "params": [p for _, p in named], "names": [n for n, _ in named], **extra}


def by_dimensions(
    name: str, named: Sequence[tuple[str, Tensor]], *, weight_decay: float, **extra: Any
) -> list[dict[str, Any]]:
    """A group of the matrices, which decay, and one of the vectors, which do not; an empty group is left out."""
    matrices = [(n, p) for n, p in named if p.ndim >= 2]
    vectors = [(n, p) for n, p in named if p.ndim < 2]
    groups = [
        named_group(f"{name} matrices", matrices, weight_decay=weight_decay, **extra),
        named_group(f"{name} vectors", vectors, weight_decay=0.0, **extra),
    ]
    return [g for g in groups if g["params"]]


def hidden_group(
    routes: Sequence[Route], stage: Stage, *, weight_decay: float, name: str = "hidden"
) -> dict[str, Any]:
    """The group of hidden matrices."""
    return named_group(
        name,
        [(r.name, r.param) for r in routes],
        chain=stage,
        layouts=[str(r.layout) for r in routes],
        weight_decay=weight_decay,
    )
