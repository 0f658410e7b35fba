"""Approach D by measurement: which hidden matrices to send uncompressed."""

import math
import re
from typing import Any

import torch
from torch import nn

from muonwire.codec.finite import all_finite
from muonwire.errors import UsageError
from muonwire.recipes.approaches import HybridSettings, approach_d
from muonwire.recipes.define import recipe_of
from muonwire.transport.base import SingleReplica, Transport

__all__ = ["choose_dense"]


def lost_shares(model: nn.Module, *, transport: Transport | None = None, **options: Any) -> dict[str, float]:
    """What the codec drops of each hidden matrix's gradient: ‖g − decoded(g)‖² / ‖g‖², averaged over the replicas.

    Args:
        model: after a backward pass; all replicas call this together, each with gradients of its own data.
        transport: the way to the other replicas. Default: one replica.
        **options: of approach_d: its codec and its routing. Default: its defaults.

    Returns:
        The share by parameter name, the same on all replicas to the last bit; 0 where a gradient is zero.

    Raises:
        UsageError: a hidden matrix has no gradient, or one that is not finite.
    """
    settings: HybridSettings = recipe_of(approach_d).make_options(options, lr=0.0)
    codec = settings.parsed_codec()
    names, shares = [], []
    for route in settings.routing(model).polar:
        if route.param.grad is None:
            raise UsageError(
                f"choose_dense: {route.name} has no gradient; call backward on a loss of some batches before"
            )
        gradient = route.param.grad.detach().float()
        names.append(route.name)
        if not all_finite(gradient):
            # The other replicas take part in the mean, and find the NaN in it.
            shares.append(gradient.new_tensor(math.nan))
            continue
        lost = gradient - codec.encode_body(gradient).decoded
        # In units of the largest entry no square overflows or vanishes.
        unit = gradient.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        shares.append((lost / unit).square().sum() / (gradient / unit).square().sum().clamp_min(1))
    (mean,) = (transport or SingleReplica()).mean([torch.stack(shares).cpu()], purpose="control")
    by_name: dict[str, float] = dict(zip(names, mean.tolist(), strict=True))
    for name, share in by_name.items():
        if not math.isfinite(share):
            raise UsageError(
                f"choose_dense: the gradient of {name} is not finite on at least one replica; give batches on which it is"
            )
    return by_name


def choose_dense(
    model: nn.Module,
    *,
    share: float,
    transport: Transport | None = None,
    **options: Any,
) -> list[str]:
    """The option ``dense`` of approach_d by measurement: patterns that match exactly the chosen matrices.

    The matrices are taken in the order of ``lost_shares``, the share of the gradient that the codec would drop, largest first, as
    long as they fit into ``share`` of all hidden parameters; one that does not fit is passed over.

    Args:
        model: after a backward pass; all replicas call this together and get the same answer.
        share: of the hidden matrices' parameters that may travel dense, in (0, 1].
        transport: the way to the other replicas. Default: one replica.
        **options: of approach_d: its codec and its routing. Default: its defaults.

    Raises:
        UsageError: a share outside (0, 1] or smaller than every matrix, or gradients that are missing or not finite.

    Source: approach D of the note “Why Muon and DisTrO conflict”, which leaves open how the layers are chosen.

    >>> import muonwire.recipes as recipes
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    >>> options = {"codec": "topk(density=0.25) | float32"}
    >>> _ = model[0].weight.grad = torch.eye(6, 4)
    >>> _ = model[1].weight.grad = torch.ones(4, 6)
    >>> dense = choose_dense(model, share=0.5, **options)
    >>> dense
    ['^1\\\\.weight$']
    >>> optimizer = recipes.approach_d(model, lr=0.01, dense=dense, **options)
    """
    if not 0 < share <= 1:
        raise UsageError(f"choose_dense: share is {share}; it must lie in (0, 1]")
    settings: HybridSettings = recipe_of(approach_d).make_options(options, lr=0.0)
    numels = {route.name: route.param.numel() for route in settings.routing(model).polar}
    room = share * sum(numels.values())
    chosen = []
    by_loss = sorted(
        lost_shares(model, transport=transport, **options).items(), key=lambda item: (-item[1], item[0])
    )
    for name, _ in by_loss:
        if numels[name] <= room:
            room -= numels[name]
            chosen.append(f"^{re.escape(name)}$")
    if not chosen:
        raise UsageError(
            f"choose_dense: share={share} of {sum(numels.values())} hidden parameters is less than the smallest matrix, "
            f"which has {min(numels.values())}; give a larger share"
        )
    return chosen
