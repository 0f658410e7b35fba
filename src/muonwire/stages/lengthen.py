"""The mean of replicas' updates at the length that they have themselves."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from muonwire.codec.host import length_of
from muonwire.codec.quantize import scales


def lengthened(mean: Tensor, lengths: Sequence[Tensor], *, replicas: int) -> Tensor:
    """``mean`` · g with g = ℓ / ‖mean‖_F, at most √R: it gets the length ℓ that the replicas' own updates have.

    Replicas that agree have a mean as long as their own updates, g = 1; R that have nothing in common one that is shorter by √R. g
    is computed in float64 and rounded to bfloat16, so that it is the same on processors that add up in another order: the chance
    that a sum's last bits move a rounding is 10⁻¹² a tensor.

    Args:
        mean: changed in place.
        lengths: of each replica's update as it was sent, float64; ℓ is their mean.
        replicas: R.

    >>> lengthened(torch.tensor([3.0, 4.0]), [torch.tensor(10.0)], replicas=16)
    tensor([6., 8.])
    """
    own = length_of(mean)
    length = torch.stack([one.to(own.device) for one in lengths]).mean()
    largest = math.sqrt(replicas)
    # Without a mean there is nothing to lengthen.
    ratio = torch.where(
        own > 0, length / own.clamp(min=torch.finfo(torch.float64).tiny), torch.ones_like(own)
    )
    factor = scales.round_nearest(ratio.clamp(min=1 / largest, max=largest))
    return mean.mul_(factor.to(mean))
