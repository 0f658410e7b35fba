"""Local steps: replicas train alone for H steps, then exchange what their weights have changed by."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.shared import KeepsShared
from muonwire.transport.base import Transport


class LocalSteps(KeepsShared):
    """Wraps any optimizer: every ``interval`` steps the weight change goes through an outer chain to the other replicas.

    Between synchronizations each replica steps its own weights w with ``inner``. Every H = ``interval`` steps, with a the shared
    weights (the same on all replicas): Δ = a − w; Δ goes through the outer chain, which exchanges it; a ← a − outer_lr · Δ̄;
    w ← a. The shared weights move by decoded payloads and element-wise arithmetic only.

    Learning-rate schedulers act on the inner optimizer's groups, which are this optimizer's ``param_groups``.

    Args:
        inner: the optimizer of the local steps; it must not talk to other replicas itself.
        outer_groups: dicts with ``params`` (parameters of ``inner``) and ``chain`` (a Stage that exchanges), and the other keys
            of ChainOptimizer's groups. Together they hold every parameter of ``inner`` once.
        interval: H, local steps a synchronization, at least 1.
        growth: steps by which H grows with every local step, at least 0: after t steps H is interval + growth · t. Default: 0.
        outer_lr: rate of the outer step. Default: 1.
        transport: the way to the other replicas.

    Raises:
        UsageError: H < 1, growth < 0, or groups that miss or repeat a parameter.

    Source: Douillard et al., "DiLoCo", arXiv 2311.08105, algorithm 1; Stich, "Local SGD", arXiv 1805.09767.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        outer_groups: Sequence[dict[str, Any]],
        *,
        interval: int,
        growth: float = 0.0,
        outer_lr: float = 1.0,
        transport: Transport,
    ) -> None:
        if interval < 1:
            raise UsageError(
                f"LocalSteps: interval (H) is {interval}; it must be at least 1 local step a synchronization"
            )
        self.inner = inner
        if growth < 0:
            raise UsageError(f"LocalSteps: growth is {growth}; it must be at least 0 steps a local step")
        self.interval = interval
        self.growth = growth
        self.transport = transport
        self.local_step = 0
        self._synchronized_step = 0
        self._anchors = {}
        groups = [self._with_anchors(group) for group in outer_groups]
        self.outer = ChainOptimizer(groups, lr=outer_lr, transport=transport)
        # The base class would make groups and states of its own; this optimizer's are the inner one's.
        super().__init__([{"params": list(group["params"])} for group in inner.param_groups], {})
        self.param_groups = inner.param_groups
        self._check_covered()

    def _with_anchors(self, group: dict[str, Any]) -> dict[str, Any]:
        anchors = []
        for param in group["params"]:
            if param in self._anchors:
                raise UsageError(
                    f"LocalSteps: a parameter of shape {tuple(param.shape)} is in two outer groups"
                )
            self._anchors[param] = torch.nn.Parameter(param.detach().clone())
            anchors.append(self._anchors[param])
        return {**group, "params": anchors}

    def _check_covered(self) -> None:
        missing = [p for group in self.param_groups for p in group["params"] if p not in self._anchors]
        if missing:
            raise UsageError(
                f"LocalSteps: {len(missing)} of the inner optimizer's parameters are in no outer group; replicas would drift "
                "apart in them. The first has shape " + str(tuple(missing[0].shape))
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its key ``outer_chain`` (a Stage) says how its change is exchanged.

        Raises:
            UsageError: there is no ``outer_chain``.
        """
        if (
            not hasattr(self, "_anchors")
            or not hasattr(self, "param_groups")
            or self.param_groups is not self.inner.param_groups
        ):
            super().add_param_group(param_group)
            return
        group = dict(param_group)
        outer_chain = group.pop("outer_chain", None)
        if outer_chain is None:
            raise UsageError(
                "LocalSteps: add_param_group needs the key outer_chain, the chain that exchanges its change"
            )
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        self.inner.add_param_group(group)
        self.outer.add_param_group(self._with_anchors({"params": group["params"], "chain": outer_chain}))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One local step, and a synchronization where H have passed since the last one."""
        loss = self.inner.step(closure)
        self.local_step += 1
        if self.steps_alone >= self.interval + self.growth * self.local_step:
            self.synchronize()
        return loss

    @property
    def synchronized(self) -> bool:
        """Whether the weights are the shared ones right now."""
        return all(torch.equal(p, anchor) for p, anchor in self._anchors.items())

    def anchor(self, param: Tensor) -> Tensor:
        """The shared weight that ``param`` departs from, the same on all replicas."""
        return self._anchors[param]

    @property
    def steps_alone(self) -> int:
        """Local steps since the last synchronization."""
        return self.local_step - self._synchronized_step

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange the weight change since the last synchronization and move the shared weights.

        Raises:
            ReplicaLostError, NonFiniteUpdateError, PayloadError: as ChainOptimizer.step.
        """
        for param, anchor in self._anchors.items():
            anchor.grad = anchor.detach() - param
        self.outer.step()
        for param, anchor in self._anchors.items():
            param.copy_(anchor)
            anchor.grad = None
        self._synchronized_step = self.local_step

    def state_dict(self) -> dict[str, Any]:
        """The inner and outer optimizers' states, the shared weights, and the numbers of local steps, in all and alone."""
        return {
            "inner": self.inner.state_dict(),
            "outer": self.outer.state_dict(),
            "anchors": [anchor.detach().clone() for anchor in self._anchors.values()],
            "local_step": self.local_step,
            "steps_alone": self.steps_alone,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups
        self.outer.load_state_dict(state_dict["outer"])
        for anchor, saved in zip(self._anchors.values(), state_dict["anchors"], strict=True):
            anchor.copy_(saved)
        self.local_step = int(state_dict["local_step"])
        self._synchronized_step = self.local_step - int(state_dict["steps_alone"])

    def __repr__(self) -> str:
        inner = str(self.inner).replace("\n", "\n  ")
        outer = str(self.outer).replace("\n", "\n  ")
        growth = f", growing by {self.growth:g} a step" if self.growth else ""
        return f"LocalSteps (interval={self.interval}{growth})\n  inner: {inner}\n  outer: {outer}"
