"""What a recipe is: a function from a model to a complete optimizer, with typed options, and a name for configuration."""

import ast
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, get_args, get_origin

from torch import nn

from muonwire.errors import UsageError
from muonwire.literals import read_expression
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import RecipeSettings
from muonwire.recipes.describe import default_of, docstring
from muonwire.transport.base import Transport
from muonwire.transport.shards import reshard

__all__ = ["Recipe", "format_recipe", "parse_call", "parse_recipe", "recipe", "recipe_of"]

P = ParamSpec("P")
S = TypeVar("S", bound=RecipeSettings)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named optimizer.

    Args:
        name: as the command line and reports have it.
        options: frozen dataclass of its options.
        build: (model, options) to the optimizer.
        summary: its chain, in one line.
        source: where it comes from: a paper and its section, or a note by its title.
    """

    name: str
    options: type[Any]
    build: Callable[[nn.Module, Any], ChainOptimizer]
    summary: str
    source: str

    def optimizer(self, model: nn.Module, given: Mapping[str, Any]) -> ChainOptimizer:
        """The optimizer with these options, ``lr`` and ``transport`` among them.

        Raises:
            UsageError: no ``lr``, and see make_options.
        """
        options = dict(given)
        if "lr" not in options:
            raise UsageError(f"recipe {self.name}: lr is missing; give a learning rate, such as lr=0.01")
        lr, transport = options.pop("lr"), options.pop("transport", None)
        reshard(model)
        return self.build(model, self.make_options(options, lr=lr, transport=transport))

    def make_options(
        self, given: Mapping[str, Any], *, lr: float = 1.0, transport: Transport | None = None
    ) -> Any:
        """The options dataclass with the given values; ``lr`` and ``transport`` are arguments of their own.

        Raises:
            UsageError: an unknown option, a value of the wrong kind or out of range, or an option that does nothing without
                another.
        """
        allowed = {f.name: f for f in fields(self.options) if f.name not in ("lr", "transport")}
        values = {}
        for key, value in given.items():
            if key not in allowed:
                raise UsageError(
                    f"recipe {self.name}: {key!r} is not an option; allowed are {', '.join(allowed) or 'none'}"
                )
            values[key] = self._checked(allowed[key], value)
        if not _is_number(lr):
            raise UsageError(f"recipe {self.name}: lr is {lr!r}; a number is wanted, such as 0.01")
        options = self.options(lr=lr, transport=transport, **values)
        for key, when in options.idle().items():
            if key in given:
                raise UsageError(
                    f"recipe {self.name}: {key} is given but does nothing here; it acts only {when}"
                )
        return options

    def _checked(self, option: "Field[Any]", value: Any) -> Any:
        """The value, if it is of the option's kind; a whole number as an int."""
        kinds = get_args(option.type) if isinstance(option.type, UnionType) else (option.type,)
        if value is None and NoneType in kinds:
            return value
        if get_origin(option.type) is Literal and value not in get_args(option.type):
            *others, last = map(str, get_args(option.type))
            allowed = f"{', '.join(others)} and {last}"
            raise UsageError(f"recipe {self.name}: {option.name} is {value!r}; allowed are {allowed}")
        known = [kind for kind in kinds if kind in _KINDS]
        fitting = [kind for kind in known if _KINDS[kind][1](value)]
        if known and not fitting:
            default = default_of(option)
            example = "" if default in (None, ()) else f", such as {default}"
            wanted = " or ".join(_KINDS[kind][0] for kind in known)
            raise UsageError(f"recipe {self.name}: {option.name} is {value!r}; {wanted} is wanted{example}")
        return int(value) if int in fitting else value


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value == int(value)


def _is_list_of_texts(value: Any) -> bool:
    return (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
    )


def _is_list_of_whole(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_whole(v) for v in value)


def _is_list_of_pairs(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_list_of_whole, value))


# By an option's type: what is wanted of a value, and whether a value is that.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", _is_number),
    int: ("a whole number", _is_whole),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    str: ("a text", lambda value: isinstance(value, str)),
    Sequence[str]: ("a list of texts", _is_list_of_texts),
    Sequence[int]: ("a list of whole numbers", _is_list_of_whole),
    Sequence[Sequence[int]]: ("a list of pairs of whole numbers", _is_list_of_pairs),
}


def recipe(
    settings: Callable[P, S], *, summary: str, source: str
) -> Callable[
    [Callable[[nn.Module, S], ChainOptimizer]], Callable[Concatenate[nn.Module, P], ChainOptimizer]
]:
    """Make of a function from a model and settings the recipe of its name, which takes the settings' fields as keywords.

    The types, the signature and the docstring of the recipe follow from the settings class, in which each option is written once.

    Args:
        settings: the recipe's settings class, a RecipeSettings.
        summary: its chain, in one line.
        source: where it comes from, as Recipe has it.

    >>> from muonwire.recipes.base import RecipeSettings
    >>> from muonwire.stages import Mean, Sign, chain
    >>> @recipe(RecipeSettings, summary="mean → sign", source="signSGD, arXiv 1802.04434")
    ... def sign_sgd(model: nn.Module, options: RecipeSettings) -> ChainOptimizer:
    ...     '''The sign of the mean gradient.'''
    ...     return options.optimizer(model, [{"params": list(model.parameters())}], chain=chain(Mean(), Sign()))
    >>> optimizer = sign_sgd(nn.Linear(2, 2), lr=0.1)
    >>> sign_sgd(nn.Linear(2, 2), lr=0.1, rate=1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    muonwire.errors.UsageError: recipe sign_sgd: 'rate' is not an option; allowed are start, ...
    """
    assert isinstance(settings, type)

    def decorate(
        build: Callable[[nn.Module, S], ChainOptimizer],
    ) -> Callable[Concatenate[nn.Module, P], ChainOptimizer]:
        described = Recipe(name=build.__name__, options=settings, build=build, summary=summary, source=source)

        @functools.wraps(build)
        def function(model: nn.Module, /, *args: P.args, **given: P.kwargs) -> ChainOptimizer:
            if args:
                raise UsageError(
                    f"recipe {described.name}: {args[0]!r} is a positional argument; give options by name, such as lr=0.01"
                )
            return described.optimizer(model, given)

        signature = _signature(settings)
        vars(function).update(
            recipe=described,
            __signature__=signature,
        )
        function.__annotations__ = {
            **{name: p.annotation for name, p in signature.parameters.items()},
            "return": ChainOptimizer,
        }
        function.__doc__ = docstring(build.__doc__ or "", summary=summary, options=settings, source=source)
        return function

    return decorate


def _signature(settings: type) -> inspect.Signature:
    """(model, *, lr, transport, ...) with the fields' types and defaults."""
    defaults = {f.name: default_of(f) for f in fields(settings)}
    options = [
        p if p.default is p.empty else p.replace(default=defaults[name])
        for name, p in inspect.signature(settings).parameters.items()
    ]
    model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY, annotation=nn.Module)
    return inspect.Signature([model, *options], return_annotation=ChainOptimizer)


def recipe_of(function: Callable[..., ChainOptimizer]) -> Recipe:
    """The Recipe of a function that ``recipe`` made."""
    found: Recipe = vars(function)["recipe"]
    return found


def parse_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """Read "muon" or "local_muon(interval=10, density=0.02)": a name, and options as Python literals; see ``parse_call``.

    >>> parse_recipe("local_muon(interval=10, codec='sign(scale=row)')")
    ('local_muon', {'interval': 10, 'codec': 'sign(scale=row)'})

    Raises:
        UsageError: the text has another form.
    """
    return parse_call(text, what="recipe", example="muon(momentum=0.9)")


def parse_call(text: str, *, what: str, example: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in a text such as "muon(momentum=0.9)"; the name may have dots, as that of a module's member.

    Args:
        text: to read.
        what: it names, for messages.
        example: for messages.

    Raises:
        UsageError: the text has another form.
    """
    try:
        expression = read_expression(text.strip())
        call = expression if isinstance(expression, ast.Call) else ast.Call(expression, [], [])
        name = ast.unparse(call.func)
        if all(word.isidentifier() for word in name.split(".")) and not call.args:
            return name, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(
        f"{what}: {text!r} does not parse; write a name, or name(option=value, ...) such as {example!r}"
    )


def format_recipe(name: str, options: Mapping[str, Any]) -> str:
    """The inverse of parse_recipe."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})" if options else name
