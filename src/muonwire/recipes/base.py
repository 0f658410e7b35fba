"""What a recipe is: a named function from a model to a complete optimizer, with typed options."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from muonwire.errors import UsageError
from muonwire.stages.adam import Adam
from muonwire.transport.base import Transport


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
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

    def adam_stage(self) -> Adam:
        """The stage with these settings."""
        return Adam(beta1=self.beta1, beta2=self.beta2, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named optimizer.

    Args:
        name: as the command line and reports have it.
        options: frozen dataclass of its options.
        build: (model, lr, exchange, options) to the optimizer.
        summary: its chain, in one line.
        source: where it comes from: paper and section, or a source's approach.
    """

    name: str
    options: type[Any]
    build: Callable[[nn.Module, float, Transport, Any], torch.optim.Optimizer]
    summary: str
    source: str

    def make_options(self, given: Mapping[str, Any]) -> Any:
        """The options dataclass with what was given.

        Raises:
            UsageError: an unknown option, or a value of the wrong kind or out of range.
        """
        allowed = {f.name: f for f in fields(self.options)}
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
        return self.options(**given)


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
