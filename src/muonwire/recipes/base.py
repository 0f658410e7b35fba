"""The classes that recipes' options are made of: what all recipes take, and the settings of one stage or two each.

A recipe's settings class inherits those of the stages in its chain and no others, so that every option has an effect.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.routing import Parts, Routing, route
from muonwire.optim.settings import Lifecycle, LocalSteps
from muonwire.recipes.groups import by_dimensions, hidden_group, trainable
from muonwire.stages import Adam, Momentum, Polar, Scale, Stage
from muonwire.transport.base import Transport

# What ``muonwire.recipes`` gives of this file.
__all__ = ["RoutedSettings"]

Method = TypeVar("Method", bound=Callable[..., Any])


def checked(method: Method) -> Method:
    """Mark a settings class's method to be called when settings are made, so that a value it does not allow is an error then."""
    vars(method)["checked"] = True
    return method


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """The options of every recipe.

    Args:
        lr: learning rate, at least 0.
        transport: the way to the other replicas. Default: one replica.
        start: "check" before the first step that all replicas hold the same weights and began with the same buffers; or "broadcast"
            those of replica 0 when the optimizer is built, which all replicas then build together. Default: "check".
        nonfinite: a gradient or update that is not finite on one replica raises NonFiniteUpdateError on all ("raise"), or the step
            is left out on all and counted ("skip"). Default: "raise".
        masters: keep float32 copies of 16-bit weights, to which small updates add up. Default: True.
        exclude_buffers: regular expressions; floating buffers whose name matches are not averaged over the replicas. Default: none.
        weight_decay: decoupled, on tensors of two or more dimensions only. Default: 0.01.
    """

    lr: float
    transport: Transport | None = None
    start: Literal["check", "broadcast"] = "check"
    nonfinite: Literal["raise", "skip"] = "raise"
    masters: bool = True
    exclude_buffers: Sequence[str] = ()
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if not self.lr >= 0:
            raise UsageError(f"recipe: lr is {self.lr}; it must be at least 0")
        for settings in reversed(type(self).__mro__):
            for name, member in vars(settings).items():
                if hasattr(member, "checked"):
                    getattr(self, name)()

    def idle(self) -> Mapping[str, str]:
        """The options that have no effect with these values of the others, each with when it acts, such as "with server=True"."""
        return {}

    @checked
    def lifecycle(self) -> Lifecycle:
        """How the optimizer behaves beside its arithmetic."""
        return Lifecycle(
            start=self.start,
            nonfinite=self.nonfinite,
            masters=self.masters,
            exclude_buffers=tuple(self.exclude_buffers),
        )

    def optimizer(
        self,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        chain: Stage | None = None,
        local: LocalSteps | None = None,
        look_ahead: Sequence[str] = (),
    ) -> ChainOptimizer:
        """The optimizer of these groups of the model's parameters; see ChainOptimizer for the other arguments."""
        return ChainOptimizer(
            groups,
            chain=chain,
            lr=self.lr,
            transport=self.transport,
            local=local,
            look_ahead=look_ahead,
            model=model,
            lifecycle=self.lifecycle(),
        )

    def uniform(self, model: nn.Module, chain: Stage, *, look_ahead: Sequence[str] = ()) -> ChainOptimizer:
        """The optimizer whose parameters all go through one chain."""
        groups = by_dimensions("all", trainable(model), weight_decay=self.weight_decay)
        return self.optimizer(model, groups, chain=chain, look_ahead=look_ahead)


@dataclass(frozen=True, kw_only=True)
class RoutedSettings(RecipeSettings):
    """Which parameters are orthogonalized.

    Args:
        polar, adam: regular expressions for parameter names to treat otherwise than routing would.
        split: regular expression to the parts of fused weights: their number, {"qkv": 3}, their sizes, {"qkv": (64, 16, 16)},
            or {"gate_up": "2 interleaved"} where the rows of the parts take turns; see ``muonwire.optim.route``.
    """

    polar: Sequence[str] = ()
    adam: Sequence[str] = ()
    split: Mapping[str, Parts] = field(default_factory=dict)

    def routing(self, model: nn.Module) -> Routing:
        """Which parameters are orthogonalized, and how the others are treated."""
        return route(model, polar=self.polar, adam=self.adam, split=self.split)

    def routed_groups(
        self, model: nn.Module, *, hidden: Stage, rest: Stage, rest_rate: float = 1.0
    ) -> list[dict[str, Any]]:
        """The groups of hidden matrices and of everything else, each with a chain of its own.

        Args:
            model: its trainable parameters.
            hidden: chain of the parameters that routing sends to polar.
            rest: chain of the others.
            rest_rate: their learning rate over ``lr``. Default: 1.
        """
        routing = self.routing(model)
        others = by_dimensions(
            "other",
            [(r.name, r.param) for r in routing.adam],
            weight_decay=self.weight_decay,
            chain=rest,
            lr=self.lr * rest_rate,
        )
        return [hidden_group(routing.polar, hidden, weight_decay=self.weight_decay), *others]

    def routed(
        self, model: nn.Module, *, hidden: Stage, rest: Stage, rest_rate: float = 1.0
    ) -> ChainOptimizer:
        """The optimizer of ``routed_groups``."""
        return self.optimizer(model, self.routed_groups(model, hidden=hidden, rest=rest, rest_rate=rest_rate))


@dataclass(frozen=True, kw_only=True)
class AdamSettings(RecipeSettings):
    """Adam.

    Args:
        beta1: decay of Adam's mean, in [0, 1). Default: 0.9.
        beta2: decay of Adam's mean square, in [0, 1). Default: 0.95.
        eps: added to Adam's denominator. Default: 1e-8.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8

    @checked
    def adam_stage(self) -> Adam:
        """The stage with these settings."""
        return Adam(beta1=self.beta1, beta2=self.beta2, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class AdamRestSettings(AdamSettings):
    """Adam for what is not orthogonalized, at a rate of its own.

    Args:
        adam_lr_ratio: learning rate of the Adam part over that of the polar part. Default: 1.
    """

    adam_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adam_lr_ratio <= 0:
            raise UsageError(f"muon: adam_lr_ratio is {self.adam_lr_ratio}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class MomentumSettings(RecipeSettings):
    """Momentum.

    Args:
        momentum: β, in [0, 1). Default: 0.95.
        nesterov: look ahead. Default: True.
    """

    momentum: float = 0.95
    nesterov: bool = True

    @checked
    def momentum_stage(self) -> Momentum:
        """The stage with these settings."""
        return Momentum(beta=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True, kw_only=True)
class PolarSettings(RecipeSettings):
    """Orthogonalization.

    Args:
        method: of the polar factor; see ``muonwire.polar.polar``. Default: "auto".
        schedule: name of its coefficients. Default: the method's own.
        dtype: of its products. Default: what the slowest replica's processor multiplies fastest.
    """

    method: str = "auto"
    schedule: str | None = None
    dtype: str | None = None

    @checked
    def polar_stage(self) -> Polar:
        """The stage with these settings."""
        return Polar(method=self.method, schedule=self.schedule, dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class ScaleSettings(RecipeSettings):
    """The scale by shape.

    Args:
        scale: "rms" (one learning rate serves polar and Adam), "spectral" or "none". Default: "rms".
    """

    scale: Literal["spectral", "rms", "small", "none"] = "rms"

    @checked
    def scale_stage(self) -> Scale:
        """The stage with these settings."""
        return Scale(kind=self.scale)
