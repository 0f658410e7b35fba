"""What an optimizer does inside a site, before the site acts as one replica; see muonwire.transport.sites.

g ← (1/k) Σᵢ gᵢ over the k replicas of a site, in the gradients' dtype on the wire, summed in rank order and at least in float32. It
is done before the chains, or a wrapped optimizer, see the gradients, so that these, and what a local step does with a gradient that
is not finite, are the same on all replicas of the site.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muonwire.errors import PayloadError, UsageError
from muonwire.optim.groups import rates
from muonwire.optim.sharded import share
from muonwire.transport.base import Transport

if TYPE_CHECKING:
    from muonwire.optim.chain import ChainOptimizer


@torch.no_grad()
def average(
    optimizer: "ChainOptimizer", params: Sequence[Tensor], problem: str | None, *, overflowed: bool
) -> tuple[str | None, bool]:
    """Average the gradients of this replica's site, and share what is wrong with them.

    A parameter has a gradient afterwards where any replica of the site had one. In a step that is repeated with the same gradients,
    since other sites have come or gone, they are the mean already.

    Args:
        optimizer: whose site it is.
        params: that are trained.
        problem: what is not finite on this replica; None where nothing is.
        overflowed: whether a scaler has found an overflow on this replica.

    Returns:
        A problem, and whether there was an overflow, on any replica of the site.

    Raises:
        UsageError: a gradient is sparse or sharded.
        ExchangeError, ReplicaLostError: as ``Transport.mean_inside``.
    """
    transport = optimizer.transport
    if transport.shards_inside:
        return share(optimizer, params, problem, overflowed=overflowed)
    if transport.num_inside == 1:
        return problem, overflowed
    before, transport.settings = transport.settings, rates(optimizer.param_groups)
    averaged = params if transport.averages_inside and not optimizer._gradients.averaged else []
    for name, param in optimizer.named_parameters() if averaged else []:
        if param.grad is not None and (param.grad.is_sparse or hasattr(param.grad, "to_local")):
            raise UsageError(
                f"ChainOptimizer: the gradient of {name} is sparse or sharded, and a site averages whole dense ones; let the loop "
                "average them, and make the transport with site_transport(averages=False)"
            )
    shares = [float(overflowed), float(problem is not None), *(float(p.grad is not None) for p in averaged)]
    # On the gradients' device, with which it travels.
    own = torch.tensor(shares, device=averaged[0].device if averaged else None)
    sent = [torch.zeros_like(p) if p.grad is None or problem is not None else p.grad for p in averaged]
    anybody, *means = transport.mean_inside([own, *sent])
    transport.settings = before
    overflow, trouble, *present = (anybody > 0).tolist()
    if trouble:
        return problem or "a loss or a gradient is not finite on another replica of this site", overflow
    for param, mean, there in zip(averaged, means, present, strict=True):
        if not there:
            continue
        if param.grad is None:
            param.grad = mean.clone()
        else:
            param.grad.copy_(mean)
    optimizer._gradients.use(params)
    optimizer._gradients.averaged = True
    return None, overflow


@torch.no_grad()
def average_buffers(optimizer: "ChainOptimizer") -> None:
    """Average the floating buffers of this replica's site, such as BatchNorm's running statistics."""
    buffers = [buffer for _, buffer in optimizer.buffers()]
    if optimizer.transport.num_inside > 1 and buffers:
        for buffer, mean in zip(buffers, optimizer.transport.mean_inside(buffers), strict=True):
            buffer.copy_(mean)


@contextmanager
def told_by_site(transport: Transport) -> Iterator[None]:
    """Within the block, an error about a payload from "replica 1" says that this is a site."""
    try:
        yield
    except PayloadError as error:
        if transport.num_inside == 1 or transport.shards_inside:
            raise
        raise PayloadError(f"between sites, which are the replicas here: {error}") from error
