"""Local steps around any torch optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.settings import Lifecycle, LocalSteps
from muonwire.stages.base import Stage
from muonwire.transport.base import Transport


def local_steps(
    optimizer: torch.optim.Optimizer,
    *,
    outer_chain: Stage | Callable[[Tensor], Stage],
    local: LocalSteps,
    transport: Transport | None = None,
    model: nn.Module | None = None,
    lifecycle: Lifecycle | None = None,
) -> ChainOptimizer:
    """Replicas step alone with ``optimizer``, and exchange the changes of their weights through the outer chain every H steps.

    The optimizer returned is the one to step, to save and to give to schedulers; its groups are those of ``optimizer``, whose state
    it carries under "around" in ``state[param]``. 16-bit weights are kept as ``optimizer`` keeps them, without masters.

    Args:
        optimizer: any, such as torch.optim.AdamW, torch.optim.Muon or a user's own; it must not talk to other replicas itself.
        outer_chain: a stage that exchanges, or a function from a parameter to one.
        local: how long replicas step alone, and the outer rate.
        transport: the way to the other replicas. Default: one replica.
        model: whose floating buffers are averaged at synchronizations, whose parameters' names are used, and whose modules gather
            weights anew after these have moved, where they are sharded, so that these need it. Default: none.
        lifecycle: see Lifecycle. Default: its defaults.

    Raises:
        UsageError: ``optimizer`` is a ChainOptimizer already, which takes outer chains itself.

    >>> from muonwire import codec, stages
    >>> net = nn.Linear(4, 2)
    >>> exchange = stages.Exchange(codec=codec.parse("sign(scale=tensor)"), feedback=stages.EF14())
    >>> inner = torch.optim.AdamW(net.parameters(), lr=0.01)
    >>> print(local_steps(inner, outer_chain=exchange, local=LocalSteps(interval=10), model=net))
    ChainOptimizer (1 replica; local steps, synchronized every 10)
      group 0: 2 tensors, 10 parameters, lr=0.01, weight_decay=0.01: AdamW
      synchronized: 2 tensors, 10 parameters, lr=1: exchange(sign(scale=tensor), EF14(decay=1.0))
    """
    if isinstance(optimizer, ChainOptimizer):
        raise UsageError(
            "local_steps: this is a ChainOptimizer; give its groups an outer_chain and the optimizer local=LocalSteps(...) instead"
        )
    names = {} if model is None else {param: name for name, param in model.named_parameters()}

    def group_of(theirs: dict[str, Any]) -> dict[str, Any]:
        params = theirs["params"]
        group = {
            **theirs,
            "outer_chain": [
                outer_chain if isinstance(outer_chain, Stage) else outer_chain(p) for p in params
            ],
        }
        if "names" not in theirs and all(p in names for p in params):
            group["names"] = [names[p] for p in params]
        return group

    return ChainOptimizer(
        [group_of(group) for group in optimizer.param_groups],
        lr=float(optimizer.defaults.get("lr", 0.0)),
        transport=transport,
        local=local,
        around=optimizer,
        model=model,
        lifecycle=lifecycle,
    )
