"""What the notes “Why Muon and DisTrO conflict” and “The failed integration of Muon and DisTrO” propose, but for low rank."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from typing_extensions import override

from muonwire.codec import parse
from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.base import MomentumSettings, PolarSettings, ScaleSettings, checked
from muonwire.recipes.compressed import CompressedSettings, FedBackSettings
from muonwire.recipes.define import recipe
from muonwire.recipes.groups import by_dimensions, hidden_group
from muonwire.stages import (
    Every,
    Mean,
    Predicted,
    ResidualMomentum,
    Serve,
    Sign,
    Stage,
    WeightPolar,
    chain,
)

CONFLICT = "“Why Muon and DisTrO conflict”"
INTEGRATION = "“The failed integration of Muon and DisTrO”"


@dataclass(frozen=True, kw_only=True)
class SignedSettings(FedBackSettings, MomentumSettings):
    """Options of approach_a."""


@recipe(
    SignedSettings,
    summary="momentum → exchange(dct, top-k, 1-bit, feedback) → sign",
    source=f"approach A of {CONFLICT}",
)
def approach_a(model: nn.Module, options: SignedSettings) -> ChainOptimizer:
    """Momentum on each replica, compressed with error feedback, and the sign of the mean: no polar factor."""
    return options.uniform(model, chain(options.momentum_stage(), options.fed_back(), Sign()))


@dataclass(frozen=True, kw_only=True)
class PostPolarSettings(CompressedSettings, ScaleSettings, PolarSettings):
    """Options of approach_b.

    Args:
        server: an owner of each hidden matrix orthogonalizes it and sends the full update to the others. Default: False,
            every replica does.
        owners: with a server, "one", replica 0 for all matrices, or "all", matrix by matrix in turn. Default: "one".
        wire: with a server, the codec of the update on its way back. Default: "bfloat16".
    """

    server: bool = False
    owners: Literal["one", "all"] = "one"
    wire: str = "bfloat16"

    @override
    def idle(self) -> Mapping[str, str]:
        without = {} if self.server else dict.fromkeys(("owners", "wire"), "with server=True")
        return {**super().idle(), **without}

    @checked
    def after_exchange(self) -> Stage:
        """polar → scale, on every replica or by the owners."""
        polar = chain(self.polar_stage(), self.scale_stage())
        served = Serve(stage=polar, codec=parse(self.wire), owners=self.owners)
        return served if self.server else polar


@recipe(
    PostPolarSettings,
    summary="residual momentum + exchange(dct, top-k, 1-bit) → polar → scale, on every replica or served by an owner",
    source=f"approach B of {CONFLICT}; orthogonalization after decompression in {INTEGRATION}",
)
def approach_b(model: nn.Module, options: PostPolarSettings) -> ChainOptimizer:
    """Compress, then orthogonalize: the polar factor of what DisTrO's exchange gives."""
    hidden = chain(options.residual(), options.after_exchange())
    return options.with_distro_rest(model, hidden)


@dataclass(frozen=True, kw_only=True)
class PrePolarSettings(FedBackSettings, CompressedSettings, ScaleSettings, PolarSettings, MomentumSettings):
    """Options of pre_polar."""


@recipe(
    PrePolarSettings,
    summary="momentum → polar → scale → exchange(dct, top-k, 1-bit, feedback)",
    source=f"orthogonalization before compression in {INTEGRATION}",
)
def pre_polar(model: nn.Module, options: PrePolarSettings) -> ChainOptimizer:
    """Orthogonalize, then compress with error feedback; DisTrO for the rest."""
    scaled = chain(options.momentum_stage(), options.polar_stage(), options.scale_stage())
    hidden = chain(scaled, options.fed_back())
    return options.with_distro_rest(model, hidden)


@dataclass(frozen=True, kw_only=True)
class PredictedSettings(PrePolarSettings):
    """Options of approach_c.

    Args:
        feedback_decay: of error feedback, in [0, 1]. The prediction already adds up what was sent, as EF21's estimate does, and
            error feedback on top adds up the difference to it once more: with 1 the two swing ever further and overflow after
            some 1,280 steps at any rate. Default: 0, without it.
    """

    feedback_decay: float = 0.0


@recipe(
    PredictedSettings,
    summary="momentum → minus a shared polar prediction → exchange(codec) → plus it → polar → scale",
    source=f"approach C of {CONFLICT}",
)
def approach_c(model: nn.Module, options: PredictedSettings) -> ChainOptimizer:
    """Send the difference of the momentum to what all replicas predict of it; DisTrO for the rest."""
    hidden = chain(
        options.momentum_stage(),
        Predicted(through=options.fed_back(), direction=options.polar_stage()),
        options.polar_stage(),
        options.scale_stage(),
    )
    return options.with_distro_rest(model, hidden)


@dataclass(frozen=True, kw_only=True)
class HybridSettings(CompressedSettings, ScaleSettings, PolarSettings, MomentumSettings):
    """Options of approach_d.

    Args:
        dense: regular expressions; hidden matrices whose name matches get dense Muon, the others DisTrO. By
            measurement: ``recipes.choose_dense`` returns such a list. Default: attention.
    """

    dense: Sequence[str] = (r"attn|attention",)


@recipe(
    HybridSettings,
    summary="by role: attention: mean → momentum → polar → scale; the rest: DisTrO",
    source=f"approach D of {CONFLICT}",
)
def approach_d(model: nn.Module, options: HybridSettings) -> ChainOptimizer:
    """Dense Muon for chosen hidden matrices, DisTrO for all others."""
    routing = options.routing(model)
    chosen = [r for r in routing.polar if any(re.search(p, r.name) for p in options.dense)]
    if not chosen:
        names = ", ".join(r.name for r in routing.polar)
        raise UsageError(
            f"approach_d: dense={list(options.dense)} matches no hidden matrix; the names are {names}"
        )
    kept = {r.name for r in chosen}
    muon = chain(Mean(), options.momentum_stage(), options.polar_stage(), options.scale_stage())
    groups = [hidden_group(chosen, muon, weight_decay=options.weight_decay, name="dense")]
    compressed = [(r.name, r.param) for r in (*routing.polar, *routing.adam) if r.name not in kept]
    groups += by_dimensions(
        "compressed", compressed, weight_decay=options.weight_decay, chain=options.distro_chain()
    )
    return options.optimizer(model, groups)


@dataclass(frozen=True, kw_only=True)
class PeriodicSettings(CompressedSettings, ScaleSettings, PolarSettings):
    """Options of approach_f.

    Args:
        period: P, steps from one full step to the next. Default: 10.
    """

    period: int = 10


@recipe(
    PeriodicSettings,
    summary="DisTrO, and every P steps the full residual momentum → polar → scale",
    source=f"approach F of {CONFLICT}",
)
def approach_f(model: nn.Module, options: PeriodicSettings) -> ChainOptimizer:
    """DisTrO with a full, orthogonalized synchronization every P steps."""
    # Sent in full, nothing of the residual momentum is left; the next round starts from zero.
    full = options.exchanged(
        parse("float32"), feedback=ResidualMomentum(decay=options.residual_decay), over="senders"
    )
    hidden = Every(
        period=options.period,
        full=chain(full, options.polar_stage(), options.scale_stage()),
        otherwise=options.distro_chain(),
        shared=("exchange",),
    )
    return options.with_distro_rest(model, hidden)


@dataclass(frozen=True, kw_only=True)
class WeightPolarSettings(CompressedSettings, PolarSettings):
    """Options of distro_weight_polar.

    Args:
        period: P, steps from one orthogonalization of the weights to the next. Default: 100.
        strength: how much of the way to its polar factor a weight goes, in (0, 1]. Default: 0.1.
    """

    period: int = 100
    strength: float = 0.1


@recipe(
    WeightPolarSettings,
    summary="DisTrO, and every P steps the weights themselves move towards their polar factors",
    source=f"future work 3 of {INTEGRATION}",
)
def distro_weight_polar(model: nn.Module, options: WeightPolarSettings) -> ChainOptimizer:
    """DisTrO whose weights are orthogonalized now and then."""
    hidden = chain(
        options.distro_chain(),
        WeightPolar(period=options.period, strength=options.strength, polar=options.polar_stage()),
    )
    return options.with_distro_rest(model, hidden)
