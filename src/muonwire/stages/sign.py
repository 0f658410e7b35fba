"""Sign."""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from muonwire.stages.base import Context, ElementwiseStage, States, Tensors


@dataclass(frozen=True, kw_only=True)
class Sign(ElementwiseStage):
    """u ← sign(u), with sign(0) = 0. Source: Bernstein et al., "signSGD", arXiv 1802.04434."""

    @override
    def apply(self, updates: Tensors, params: Tensors, states: States, context: Context) -> list[Tensor]:
        return [u.sign() for u in updates]

    def __str__(self) -> str:
        return "sign"
