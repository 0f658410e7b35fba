"""What an optimizer sends, before anything is trained."""

import torch

from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.local_steps import LocalSteps
from muonwire.stages.layout import MatrixLayout


def estimate_bytes(optimizer: torch.optim.Optimizer, *, replicas: int) -> float | None:
    """Bytes that each replica sends per step, on average, by the stages' formulas.

    Messages' frames, 16 bytes each, are not counted.

    Args:
        optimizer: as a recipe makes it.
        replicas: how many would train together; one sends nothing.

    Returns:
        Bytes, or None where a stage that talks has no formula, or the interval grows.

    >>> from muonwire import stages
    >>> weight = torch.nn.Parameter(torch.zeros(4, 8))
    >>> dense = ChainOptimizer([weight], chain=stages.chain(stages.Mean(), stages.Sign()), lr=0.1)
    >>> estimate_bytes(dense, replicas=2)
    128.0
    """
    if replicas == 1:
        return 0.0
    if isinstance(optimizer, LocalSteps):
        synchronization = estimate_bytes(optimizer.outer, replicas=replicas)
        # Where the interval grows, the average depends on the length of the run.
        if synchronization is None or optimizer.growth > 0:
            return None
        return synchronization / optimizer.interval
    if not isinstance(optimizer, ChainOptimizer):
        inner = getattr(optimizer, "inner", None)
        return None if inner is None else estimate_bytes(inner, replicas=replicas)
    total = 0.0
    for group, chain in zip(optimizer.param_groups, optimizer.chains, strict=True):
        sent = [
            (p, MatrixLayout.parse(layout))
            for p, layout in zip(group["params"], group["layouts"], strict=True)
            if p.requires_grad
        ]
        part = chain.estimate_bytes([p for p, _ in sent], [layout for _, layout in sent], replicas=replicas)
        if part is None:
            return None
        total += part
    return total
