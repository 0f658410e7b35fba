"""Draws for stochastic rounding."""

import zlib

import numpy as np
import torch
from torch import Tensor

from muonwire.codec.host import send


def uniforms(values: Tensor, *, seed: int) -> Tensor:
    """One multiple of 2⁻²⁴ in [0, 1) for each value, from Philox keyed by the round's seed and the values' CRC-32.

    On an accelerator the values cross to the host for it.

    The seed is the same on all replicas. Drawn from it alone, u would be too, and two replicas' errors 1[f > u] − f of the
    fractions f and g would have the covariance min(f, g) − f g > 0: half of their variance over random fractions, which no mean
    over replicas takes away. Only the sender draws, so that what it draws from need not travel.

    >>> uniforms(torch.tensor([1.0, 2.0]), seed=7).equal(uniforms(torch.tensor([1.0, 2.0]), seed=7))
    True

    Source of the generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    key = seed << 32 | zlib.crc32(values.contiguous().cpu().numpy().data)
    words = np.random.Philox(key=key).random_raw((values.numel() + 1) // 2)
    halves = words.astype("<u8").view("<u4")[: values.numel()]
    return send(torch.from_numpy((halves >> 8).astype(np.float32)).mul_(2.0**-24), values.device)


def round_magnitudes(magnitude: Tensor, draws: Tensor) -> Tensor:
    """Round each magnitude x ≥ 0 up with probability x − ⌊x⌋ (to 2⁻²⁴), down otherwise: its mean is x, integers stay."""
    below = magnitude.floor()
    return below + (magnitude - below > draws)
