"""Gradients taken where the kept residual would lead."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.shared import KeepsShared


class LookAhead(KeepsShared):
    """Wraps a ChainOptimizer: between steps the parameters hold θ − lr · sign(δ), with θ the shared weights.

    δ is what this replica has not sent yet, so that its next gradient is taken where its own unsent share would lead. A step
    puts θ back to the last bit, steps it with ``inner``, and looks ahead again with the rate of that step; the replicas share θ
    and differ in what they hold.

    Learning-rate schedulers act on the inner optimizer's groups, which are this optimizer's ``param_groups``.

    Args:
        inner: the optimizer of the shared weights.
        residual: where a parameter's state holds δ, such as ("exchange", "residual").

    Raises:
        UsageError: a parameter's state holds no such tensor.

    Source: Psyche's distro.rs.
    """

    def __init__(self, inner: ChainOptimizer, *, residual: Sequence[str]) -> None:
        self.inner = inner
        self._path = tuple(residual)
        self._anchors = {}
        # The base class would make groups of its own; this optimizer's are the inner one's.
        super().__init__([{"params": list(group["params"])} for group in inner.param_groups], {})
        self.param_groups = inner.param_groups
        for group in self.param_groups:
            self._anchor(group["params"])

    def _anchor(self, params: Sequence[Tensor]) -> None:
        for param in params:
            if param.requires_grad:
                self._residual(param)
                self._anchors[param] = param.detach().clone()

    def _residual(self, param: Tensor) -> Tensor:
        found: Any = self.inner.state[param]
        for name in self._path:
            if not isinstance(found, dict) or name not in found:
                raise UsageError(
                    f"LookAhead: the state of a parameter of shape {tuple(param.shape)} has no {'.'.join(self._path)}; name the "
                    f"exchange whose residual is looked ahead by, in the chain {self.param_groups[0].get('chain')}"
                )
            found = found[name]
        residual: Tensor = found
        return residual

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; see ChainOptimizer."""
        if self.__dict__.get("param_groups") is not self.inner.param_groups:
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)
        self._anchor(self.param_groups[-1]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the shared weights; if it raises, the parameters hold the shared weights.

        Raises:
            ReplicaLostError, NonFiniteUpdateError, PayloadError: as ChainOptimizer.step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._hold_shared()
        self.inner.step()
        for group in self.param_groups:
            for param in group["params"]:
                if param in self._anchors:
                    self._anchors[param].copy_(param)
                    param.sub_(self._residual(param).sign().to(param.dtype), alpha=float(group["lr"]))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state and the shared weights; what the parameters hold is the model's."""
        return {
            "inner": self.inner.state_dict(),
            "anchors": [anchor.detach().clone() for anchor in self._anchors.values()],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups
        for anchor, saved in zip(self._anchors.values(), state_dict["anchors"], strict=True):
            anchor.copy_(saved)

    def __repr__(self) -> str:
        return f"LookAhead by {'.'.join(self._path)}: {self.inner}"
