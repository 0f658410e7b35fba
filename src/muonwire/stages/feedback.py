"""Feedback: what the codec dropped, kept for the next round."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.codec.base import Encoded
from muonwire.errors import UsageError
from muonwire.stages.base import Context, State


class Feedback(ABC):
    """What is encoded each round, what of it is kept, and what update follows from the mean of what was sent."""

    # Whether ``restore`` needs the mean over all replicas; a mean over the senders does not do.
    needs_replicas: ClassVar[bool] = False
    # See Stage.needs_same_replicas.
    needs_same_replicas: ClassVar[str] = ""
    # See Stage.replaces_states; of the tensors that were there before the step.
    replaces_states: ClassVar[bool] = False
    # Whether ``restore`` makes something else of the mean.
    restores: ClassVar[bool] = False
    # Entries of the state that are the same on all replicas, since what all have sent moves them; the rest is the replica's own.
    shared: ClassVar[tuple[str, ...]] = ()

    def init(self, param: Tensor) -> State:
        """The kept residual, zero."""
        return {"residual": torch.zeros_like(param, memory_format=torch.preserve_format)}

    @abstractmethod
    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """What goes to the codec."""

    @abstractmethod
    def keep(self, encoded: Encoded, state: State) -> None:
        """Keep in the state what was not sent."""

    def restore(self, mean: Tensor, state: State) -> Tensor:
        """The update that ``mean``, of all replicas' decoded signals, stands for; the same bits on all replicas."""
        return mean

    def __str__(self) -> str:
        options = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({options})" if options else type(self).__name__


def _check_share(where: str, option: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UsageError(f"{where}: {option} is {value}; it must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class NoFeedback(Feedback):
    """Nothing is kept: what the codec drops is lost."""

    replaces_states: ClassVar[bool] = True

    @override
    def init(self, param: Tensor) -> State:
        return {}

    @override
    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """The update itself."""
        return update

    @override
    def keep(self, encoded: Encoded, state: State) -> None:
        """Keep nothing."""


@dataclass(frozen=True, kw_only=True)
class EF14(Feedback):
    """Error feedback: s = decay · e + u is encoded, and e ← s − decoded(s), the quantizer's error included.

    Args:
        decay: of the residual from round to round, in [0, 1]; 1 loses nothing. Default: 1.

    Source: Seide et al., "1-bit SGD" (2014); Karimireddy et al., arXiv 1901.09847, algorithm 2.
    """

    replaces_states: ClassVar[bool] = True
    decay: float = 1.0

    def __post_init__(self) -> None:
        _check_share("EF14", "decay", self.decay)

    @override
    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Decay · e + u."""
        residual: Tensor = state["residual"]
        state["residual"] = signal = residual.mul(self.decay).add_(update)
        return signal

    @override
    def keep(self, encoded: Encoded, state: State) -> None:
        """e ← s − decoded(s)."""
        state["residual"].sub_(encoded.decoded)


@dataclass(frozen=True, kw_only=True)
class EF21(Feedback):
    """Each replica sends what moves its estimate gᵣ of its update: s = u − gᵣ is encoded, gᵣ ← gᵣ + decoded(s).

    The update of all is ḡ = (1/R) Σᵣ gᵣ, which every replica follows by ḡ ← ḡ + mean(decoded) from the same start, zero. Both are
    kept in float32 at least, in which ḡ departs from the mean of the gᵣ by one rounding a round. For EF21 with momentum, put a
    Momentum stage before the exchange.

    Source: Richtárik et al., "EF21", arXiv 2106.05203, algorithm 2; with momentum: Fatkhullin et al., arXiv 2305.15155.
    """

    needs_replicas: ClassVar[bool] = True
    needs_same_replicas: ClassVar[str] = (
        "its mean estimate is that of the replicas which were there from the start"
    )
    replaces_states: ClassVar[bool] = True
    restores: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("mean_estimate",)

    @override
    def init(self, param: Tensor) -> State:
        """The estimate of this replica's update, and the mean of all replicas' estimates, both zero."""
        dtype = torch.promote_types(param.dtype, torch.float32)
        return {
            "estimate": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
            "mean_estimate": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        }

    @override
    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """u − gᵣ."""
        estimate: Tensor = state["estimate"]
        return update - estimate

    @override
    def keep(self, encoded: Encoded, state: State) -> None:
        """Move gᵣ by what was sent."""
        state["estimate"] = state["estimate"] + encoded.decoded

    @override
    def restore(self, mean: Tensor, state: State) -> Tensor:
        """Move ḡ by the mean of what all replicas sent, and return it."""
        state["mean_estimate"] = state["mean_estimate"] + mean
        moved: Tensor = state["mean_estimate"]
        return moved


@dataclass(frozen=True, kw_only=True)
class ResidualMomentum(Feedback):
    """DeMo's momentum, which is the residual: δ ← decay · δ + lr · u is encoded, and δ ← δ − factor · sent.

    Args:
        decay: in [0, 1]. Default: 0.999.
        subtract: what counts as sent: "decoded", decoded(δ), as DeMo, whose values are not quantized; "selected", the selected
            entries *before* quantization, as Psyche's DisTrO, which loses the 1-bit error.
        factor: of what was sent, in [0, 1]; 0 is momentum without feedback. Default: 1.

    Raises:
        UsageError: an option outside these.

    Source: Peng et al., "DeMo", arXiv 2411.19870, algorithm 1; Psyche's distro.rs for "selected".
    """

    replaces_states: ClassVar[bool] = True
    decay: float = 0.999
    subtract: str = "decoded"
    factor: float = 1.0

    def __post_init__(self) -> None:
        _check_share("residual momentum", "decay", self.decay)
        _check_share("residual momentum", "factor", self.factor)
        if self.subtract not in ("decoded", "selected"):
            raise UsageError(
                f"residual momentum: subtract is {self.subtract!r}; allowed are decoded and selected"
            )

    @override
    def signal(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Decay · δ + lr · u."""
        residual: Tensor = state["residual"]
        state["residual"] = signal = residual.mul(self.decay).add_(update, alpha=context.lr)
        return signal

    @override
    def keep(self, encoded: Encoded, state: State) -> None:
        """Subtract what was sent."""
        sent = encoded.decoded if self.subtract == "decoded" else encoded.selected
        state["residual"].sub_(sent, alpha=self.factor)
