"""What a recipe is: a named function from a model to a complete optimizer, with typed options."""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, Unpack

from torch import nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.settings import Lifecycle, LocalSteps
from muonwire.stages.adam import Adam
from muonwire.stages.base import Stage
from muonwire.transport.base import Transport


class OptimizerParts(TypedDict, total=False):
    """What recipes hand to ChainOptimizer besides groups and settings."""

    chain: Stage
    local: LocalSteps
    look_ahead: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """What every recipe takes.

    Args:
        lr: learning rate, at least 0.
        transport: the way to the other replicas. Default: one replica.
        start: "check" before the first step that all replicas start with the same weights and buffers, or "broadcast" those of
            replica 0 when the optimizer is built. Default: "check".
        nonfinite: "raise" on all replicas where a gradient is not finite on one, or "skip" the step and count it. Default: "raise".
        masters: keep float32 copies of 16-bit weights. Default: True.
        exclude_buffers: regular expressions for names of floating buffers that are not averaged over the replicas. Default: none.
    """

    lr: float
    transport: Transport | None = None
    start: str = "check"
    nonfinite: str = "raise"
    masters: bool = True
    exclude_buffers: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise UsageError(f"recipe: lr is {self.lr}; it must be at least 0")
        self.lifecycle()

    def lifecycle(self) -> Lifecycle:
        """How the optimizer behaves beside its arithmetic."""
        return Lifecycle(
            start=self.start,
            nonfinite=self.nonfinite,
            masters=self.masters,
            exclude_buffers=tuple(self.exclude_buffers),
        )

    def optimizer(
        self, model: nn.Module, groups: Sequence[dict[str, Any]], **parts: Unpack[OptimizerParts]
    ) -> ChainOptimizer:
        """The optimizer of these groups of the model's parameters."""
        return ChainOptimizer(
            groups, lr=self.lr, transport=self.transport, model=model, lifecycle=self.lifecycle(), **parts
        )


@dataclass(frozen=True, kw_only=True)
class AdamSettings(RecipeSettings):
    """The options that every recipe with an Adam part shares.

    Args:
        beta1: decay of Adam's mean, in [0, 1). Default: 0.9.
        beta2: decay of Adam's mean square, in [0, 1). Default: 0.95.
        eps: added to Adam's denominator. Default: 1e-8.
        weight_decay: decoupled, on tensors of two or more dimensions only. Default: 0.01.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adam_stage()

    def adam_stage(self) -> Adam:
        """The stage with these settings."""
        return Adam(beta1=self.beta1, beta2=self.beta2, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named optimizer.

    Args:
        name: as the command line and reports have it.
        options: frozen dataclass of its options.
        build: (model, options) to the optimizer.
        summary: its chain, in one line.
        source: where it comes from: paper and section, or a source's approach.
    """

    name: str
    options: type[Any]
    build: Callable[[nn.Module, Any], ChainOptimizer]
    summary: str
    source: str

    def make_options(
        self, given: Mapping[str, Any], *, lr: float = 1.0, transport: Transport | None = None
    ) -> Any:
        """The options dataclass with what was given, as on the command line; ``lr`` and ``transport`` are no options there.

        Raises:
            UsageError: an unknown option, or a value of the wrong kind or out of range.
        """
        allowed = {f.name: f for f in fields(self.options) if f.name not in ("lr", "transport")}
        for key, value in given.items():
            if key not in allowed:
                raise UsageError(
                    f"recipe {self.name}: {key!r} is not an option; allowed are {', '.join(allowed) or 'none'}"
                )
            default = allowed[key].default
            number = isinstance(default, int | float) and not isinstance(default, bool)
            if number and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UsageError(
                    f"recipe {self.name}: {key} is {value!r}; a number is wanted, such as {default}"
                )
            if isinstance(default, int) and not isinstance(default, bool) and value != int(value):
                raise UsageError(
                    f"recipe {self.name}: {key} is {value!r}; a whole number is wanted, such as {default}"
                )
        return self.options(lr=lr, transport=transport, **given)


def parse_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """Read "muon" or "local_muon(interval=10, density=0.02)": a name, and options as Python literals.

    >>> parse_recipe("local_muon(interval=10, codec='sign(scale=row)')")
    ('local_muon', {'interval': 10, 'codec': 'sign(scale=row)'})

    Raises:
        UsageError: the text has another form.
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
        if isinstance(expression, ast.Name):
            return expression.id, {}
        if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name) and not expression.args:
            return expression.func.id, {
                str(k.arg): ast.literal_eval(k.value) for k in expression.keywords if k.arg
            }
    except (SyntaxError, ValueError):
        pass
    raise UsageError(
        f"recipe: {text!r} does not parse; write a name, or name(option=value, ...) such as 'muon(momentum=0.9)'"
    )


def format_recipe(name: str, options: Mapping[str, Any]) -> str:
    """The inverse of parse_recipe."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})" if options else name
