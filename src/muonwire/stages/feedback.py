"""Feedback: what the codec dropped, kept for the next round."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from muonwire.codec.base import Encoded
from muonwire.errors import UsageError
from muonwire.stages.base import Context, State


class Feedback(ABC):
    """What is encoded each round, and what of it is kept."""

    def init(self, param: Tensor) -> State:
        """The kept residual, zero."""
        return {"residual": torch.zeros_like(param, memory_format=torch.preserve_format)}

    @abstractmethod
    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """What goes to the codec."""

    @abstractmethod
    def keep(self, encoded: Encoded, state: State) -> None:
        """Take note of what went out."""

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({options})"


def _check_decay(where: str, decay: float) -> None:
    if not 0 <= decay <= 1:
        raise UsageError(f"{where}: decay is {decay}; it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class NoFeedback(Feedback):
    """Nothing is kept: what the codec drops is lost."""

    def init(self, param: Tensor) -> State:
        """No state."""
        return {}

    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """The update itself."""
        return update

    def keep(self, encoded: Encoded, state: State) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class EF14(Feedback):
    """Error feedback: s = decay · e + u is encoded, and e ← s − decoded(s), the quantizer's error included.

    Args:
        decay: of the residual from round to round, in [0, 1]; 1 loses nothing. Default: 1.

    Source: Seide et al., "1-bit SGD" (2014); Karimireddy et al., arXiv 1901.09847, algorithm 2.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        _check_decay("EF14", self.decay)

    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Decay · e + u."""
        residual: Tensor = state["residual"]
        return residual.mul_(self.decay).add_(update)

    def keep(self, encoded: Encoded, state: State) -> None:
        """Keep what was not sent."""
        state["residual"].sub_(encoded.decoded)


@dataclass(frozen=True, kw_only=True)
class ResidualMomentum(Feedback):
    """DeMo's momentum, which is the residual: δ ← decay · δ + lr · u is encoded, and what was sent is subtracted.

    Args:
        decay: in [0, 1]. Default: 0.999.
        subtract: "decoded": δ ← δ − decoded(δ), as DeMo, whose values are not quantized; "selected": δ ← δ − the selected
            entries *before* quantization, as Psyche's DisTrO, which loses the 1-bit error.

    Source: Peng et al., "DeMo", arXiv 2411.19870, algorithm 1; Psyche's distro.rs for "selected".
    """

    decay: float = 0.999
    subtract: str = "decoded"

    def __post_init__(self) -> None:
        _check_decay("residual momentum", self.decay)
        if self.subtract not in ("decoded", "selected"):
            raise UsageError(
                f"residual momentum: subtract is {self.subtract!r}; allowed are decoded and selected"
            )

    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Decay · δ + lr · u."""
        residual: Tensor = state["residual"]
        return residual.mul_(self.decay).add_(update, alpha=context.lr)

    def keep(self, encoded: Encoded, state: State) -> None:
        """Subtract what went out."""
        state["residual"].sub_(encoded.decoded if self.subtract == "decoded" else encoded.selected)
