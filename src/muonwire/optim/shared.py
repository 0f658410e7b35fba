"""Optimizers whose parameters may hold other weights than those that all replicas share."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


class KeepsShared(torch.optim.Optimizer):
    """Keeps the shared weights apart from what its parameters hold."""

    # The shared weights by parameter.
    _anchors: dict[Tensor, Tensor]

    @torch.no_grad()
    def _hold_shared(self) -> None:
        """The parameters become the shared weights."""
        for param, anchor in self._anchors.items():
            param.copy_(anchor)

    @contextmanager
    def shared_weights(self) -> Iterator[None]:
        """Within the block the parameters hold the shared weights, for evaluation and comparison."""
        own = {p: p.detach().clone() for p in self._anchors}
        self._hold_shared()
        try:
            yield
        finally:
            with torch.no_grad():
                for param, value in own.items():
                    param.copy_(value)


def shared_weights(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Within the block the model holds the weights that all replicas share, whatever the optimizer."""
    return optimizer.shared_weights() if isinstance(optimizer, KeepsShared) else nullcontext()
