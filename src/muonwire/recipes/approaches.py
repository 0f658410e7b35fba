"""Source 000's approaches A to D and F, and source 001's polar factor before compression."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from muonwire.codec import parse
from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import Recipe
from muonwire.recipes.compressed import CompressedSettings, hidden_group, two_groups
from muonwire.recipes.dense import by_dimensions, trainable
from muonwire.stages import (
    Every,
    Exchange,
    Mean,
    Predicted,
    ResidualMomentum,
    Serve,
    Sign,
    Stage,
    WeightPolar,
    chain,
)

SOURCE = "source 000"


def _approach_a(model: nn.Module, options: CompressedSettings) -> ChainOptimizer:
    stages = chain(options.momentum_stage(), options.fed_back(), Sign())
    groups = by_dimensions("all", trainable(model), weight_decay=options.weight_decay)
    return options.optimizer(model, groups, chain=stages)


@dataclass(frozen=True, kw_only=True)
class PostPolarSettings(CompressedSettings):
    """Options of approach_b; those of the compressed recipes are inherited.

    Args:
        server: an owner of each hidden matrix orthogonalizes it and sends the full update to the others. Default: False,
            every replica does.
        owners: with a server, "one", replica 0 for all matrices, or "all", matrix by matrix in turn. Default: "one".
        wire: with a server, the codec of the update on its way back. Default: "bfloat16".
    """

    server: bool = False
    owners: str = "one"
    wire: str = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.after_exchange()

    def after_exchange(self) -> Stage:
        """Polar → scale, on every replica or served."""
        polar = chain(self.polar_stage(), self.scale_stage())
        served = Serve(stage=polar, codec=parse(self.wire), owners=self.owners)
        return served if self.server else polar


def _approach_b(model: nn.Module, options: PostPolarSettings) -> ChainOptimizer:
    hidden = chain(options.residual(), options.after_exchange())
    return two_groups(model, options, hidden=hidden, rest=options.distro())


def _pre_polar(model: nn.Module, options: CompressedSettings) -> ChainOptimizer:
    hidden = chain(options.polar_chain(), options.fed_back())
    return two_groups(model, options, hidden=hidden, rest=options.distro())


@dataclass(frozen=True, kw_only=True)
class PredictedSettings(CompressedSettings):
    """Options of approach_c; those of the compressed recipes are inherited.

    Args:
        feedback_decay: of error feedback, in [0, 1]. The prediction already adds up what was sent, as EF21's estimate does, and
            error feedback on top adds up the difference to it once more: with 1 the two swing ever further and overflow after
            some 1,280 steps at any rate. Default: 0, without it.
    """

    feedback_decay: float = 0.0


def _approach_c(model: nn.Module, options: PredictedSettings) -> ChainOptimizer:
    hidden = chain(
        options.momentum_stage(),
        Predicted(through=options.fed_back(), direction=options.polar_stage()),
        options.polar_stage(),
        options.scale_stage(),
    )
    return two_groups(model, options, hidden=hidden, rest=options.distro())


@dataclass(frozen=True, kw_only=True)
class HybridSettings(CompressedSettings):
    """Options of approach_d; those of the compressed recipes are inherited.

    Args:
        dense: regular expressions; hidden matrices whose name matches get dense Muon, the others DisTrO. By
            measurement: ``recipes.choose_dense`` returns such a list. Default: attention.
    """

    dense: Sequence[str] = (r"attn|attention",)


def _approach_d(model: nn.Module, options: HybridSettings) -> ChainOptimizer:
    routing = options.routing(model)
    routes = [(r.name, r.param, str(r.layout)) for r in routing.polar]
    chosen = [route for route in routes if any(re.search(p, route[0]) for p in options.dense)]
    if not chosen:
        names = ", ".join(name for name, _, _ in routes)
        raise UsageError(
            f"approach_d: dense={list(options.dense)} matches no hidden matrix; the names are {names}"
        )
    kept = {name for name, _, _ in chosen}
    groups = [hidden_group(chosen, chain(Mean(), options.polar_chain()), options, name="dense")]
    compressed = [(name, p) for name, p, _ in routes if name not in kept]
    compressed += [(r.name, r.param) for r in routing.adam]
    groups += by_dimensions(
        "compressed", compressed, weight_decay=options.weight_decay, chain=options.distro()
    )
    return options.optimizer(model, groups)


@dataclass(frozen=True, kw_only=True)
class PeriodicSettings(CompressedSettings):
    """Options of approach_f and distro_weight_polar; those of the compressed recipes are inherited.

    Args:
        period: P, steps from one full step to the next. Default: 10.
    """

    period: int = 10


@dataclass(frozen=True, kw_only=True)
class WeightPolarSettings(PeriodicSettings):
    """Options of distro_weight_polar; those of approach_f are inherited.

    Args:
        period: P, steps from one orthogonalization of the weights to the next. Default: 100.
        strength: how much of the way to its polar factor a weight goes, in (0, 1]. Default: 0.1.
    """

    period: int = 100
    strength: float = 0.1


def _approach_f(model: nn.Module, options: PeriodicSettings) -> ChainOptimizer:
    # Sent in full, nothing of the residual momentum is left; the next round starts from zero.
    full = Exchange(
        codec=parse("float32"), feedback=ResidualMomentum(decay=options.residual_decay), over="senders"
    )
    hidden = Every(
        period=options.period,
        full=chain(full, options.polar_stage(), options.scale_stage()),
        otherwise=options.distro(),
        shared=("exchange",),
    )
    return two_groups(model, options, hidden=hidden, rest=options.distro())


def _weight_polar(model: nn.Module, options: WeightPolarSettings) -> ChainOptimizer:
    hidden = chain(
        options.distro(),
        WeightPolar(period=options.period, strength=options.strength, polar=options.polar_stage()),
    )
    return two_groups(model, options, hidden=hidden, rest=options.distro())


APPROACH_A = Recipe(
    name="approach_a",
    options=CompressedSettings,
    build=_approach_a,
    summary="momentum → exchange(dct, top-k, 1-bit, feedback) → sign",
    source=f"{SOURCE}, approach A",
)
APPROACH_B = Recipe(
    name="approach_b",
    options=PostPolarSettings,
    build=_approach_b,
    summary="residual momentum + exchange(dct, top-k, 1-bit) → polar → scale, on every replica or served by an owner",
    source=f"{SOURCE}, approach B; source 001, orthogonalization after decompression",
)
APPROACH_C = Recipe(
    name="approach_c",
    options=PredictedSettings,
    build=_approach_c,
    summary="momentum → minus a shared polar prediction → exchange(codec) → plus it → polar → scale",
    source=f"{SOURCE}, approach C",
)
APPROACH_D = Recipe(
    name="approach_d",
    options=HybridSettings,
    build=_approach_d,
    summary="by role: attention: mean → momentum → polar → scale; the rest: DisTrO",
    source=f"{SOURCE}, approach D",
)
APPROACH_F = Recipe(
    name="approach_f",
    options=PeriodicSettings,
    build=_approach_f,
    summary="DisTrO, and every P steps the full residual momentum → polar → scale",
    source=f"{SOURCE}, approach F",
)
PRE_POLAR = Recipe(
    name="pre_polar",
    options=CompressedSettings,
    build=_pre_polar,
    summary="momentum → polar → scale → exchange(dct, top-k, 1-bit, feedback)",
    source="source 001, orthogonalization before compression",
)
DISTRO_WEIGHT_POLAR = Recipe(
    name="distro_weight_polar",
    options=WeightPolarSettings,
    build=_weight_polar,
    summary="DisTrO, and every P steps the weights themselves move towards their polar factors",
    source="source 001, future work 3",
)
