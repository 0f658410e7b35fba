"""Inputs that every polar test draws on."""

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


def spectra(r: int = 256) -> dict[str, Tensor]:
    k = np.arange(1, r + 1.0)
    rows = torch.exp(gaussian(r, 1, 7))
    return {
        "gaussian wide": gaussian(r, 4 * r),
        "gaussian square": gaussian(r, r),
        "gaussian tall": gaussian(3 * r, r),
        "1/k": with_values(1 / k, r),
        "1/k wide": with_values(1 / k, 4 * r),
        "log-normal rows": gaussian(r, 4 * r, 3) * rows,
        "log-normal rows square": gaussian(r, r, 3) * rows,
        "1/k²": with_values(1 / k**2, r),
        "rank one": gaussian(r, 1) @ gaussian(1, r, 2),
        "half rank": gaussian(r, r // 2) @ gaussian(r // 2, 4 * r, 2),
        "two levels": with_values(np.r_[np.ones(r // 8), 0.02 * np.ones(r - r // 8)], r),
    }
