"""Inputs that every polar test draws on."""

from functools import cache

import numpy as np
import torch
from torch import Tensor


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def with_values(values: np.ndarray, n: int, seed: int = 0) -> Tensor:
    r = len(values)
    left = torch.linalg.qr(gaussian(r, r, seed))[0]
    right = torch.linalg.qr(gaussian(n, r, seed + 1))[0]
    return (left * torch.as_tensor(values, dtype=torch.float32)) @ right.mT


# By name: a matrix of r singular values. Made when a test asks for it, since all workers import the tests of all.
SPECTRA = {
    "gaussian wide": lambda r: gaussian(r, 4 * r),
    "gaussian square": lambda r: gaussian(r, r),
    "gaussian tall": lambda r: gaussian(3 * r, r),
    "1/k": lambda r: with_values(1 / _numbers(r), r),
    "1/k wide": lambda r: with_values(1 / _numbers(r), 4 * r),
    "log-normal rows": lambda r: gaussian(r, 4 * r, 3) * torch.exp(gaussian(r, 1, 7)),
    "log-normal rows square": lambda r: gaussian(r, r, 3) * torch.exp(gaussian(r, 1, 7)),
    "1/k²": lambda r: with_values(1 / _numbers(r) ** 2, r),
    "rank one": lambda r: gaussian(r, 1) @ gaussian(1, r, 2),
    "half rank": lambda r: gaussian(r, r // 2) @ gaussian(r // 2, 4 * r, 2),
    "two levels": lambda r: with_values(np.r_[np.ones(r // 8), 0.02 * np.ones(r - r // 8)], r),
}


def _numbers(r: int) -> np.ndarray:
    return np.arange(1, r + 1.0)


@cache
def _spectrum(name: str, r: int) -> Tensor:
    return SPECTRA[name](r)


def spectrum(name: str, r: int = 256) -> Tensor:
    return _spectrum(name, r).clone()
