"""Dense Muon whose mean comes after the update instead of before it: what each replica's own update costs where data are unequal.

`muonwire compare` takes the recipe by the name of its module, benchmarks/apart.py:

    muonwire compare --recipes "benchmarks.apart.apart(hidden_after=True)" --own-text --replicas 8 --virtual
"""

from dataclasses import dataclass

from torch import nn

from muonwire.optim.chain import ChainOptimizer
from muonwire.recipes.define import recipe
from muonwire.recipes.dense import MuonSettings
from muonwire.stages import Chain, Mean, Stage, chain


@dataclass(frozen=True, kw_only=True)
class ApartSettings(MuonSettings):
    """Options of apart.

    Args:
        hidden_after: average what momentum → polar → scale makes of each replica's own gradient. Default: False.
        rest_after: average what Adam makes of each replica's own gradient. Default: False.
        momentum: β, in [0, 1). Default: 0.9, as one_bit_muon has it.
    """

    hidden_after: bool = False
    rest_after: bool = False
    momentum: float = 0.9


def _with_mean(stage: Stage, *, after: bool) -> Chain:
    return chain(stage, Mean()) if after else chain(Mean(), stage)


@recipe(
    ApartSettings,
    summary="mean → momentum → polar → scale and mean → adam, or the mean after either",
    source="muonwire, docs/experiments.md",
)
def apart(model: nn.Module, options: ApartSettings) -> ChainOptimizer:
    """Dense Muon, or the mean of replicas' own updates."""
    return options.routed(
        model,
        hidden=_with_mean(options.polar_chain(), after=options.hidden_after),
        rest=_with_mean(options.adam_stage(), after=options.rest_after),
        rest_rate=options.adam_lr_ratio,
    )
