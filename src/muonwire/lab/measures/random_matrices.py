"""How near random matrices come to being singular: Edelman's law, exact tests of signs, and what rounding reaches."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]
BITS_OF_BFLOAT16 = 8


def edelman_cdf(t: Values) -> Values:
    """P(√n σ_min ≤ t) of an n×n matrix of independent standard normal entries, n → ∞: 1 − exp(−t²/2 − t).

    Source: Edelman, "Eigenvalues and condition numbers of random matrices" (1988): n σ_min² has the density
    (1 + √x)/(2√x) exp(−(x/2 + √x)).
    """
    share: Values = -np.expm1(-(t**2) / 2 - t)
    return share


def edelman_quantile(share: float) -> float:
    """The t with ``edelman_cdf(t) = share``: √(1 − 2 ln(1 − share)) − 1."""
    return math.sqrt(1 - 2 * math.log1p(-share)) - 1


def is_singular(signs: Tensor) -> Tensor:
    """Whether each matrix of entries ±1 is singular, decided exactly.

    Adding the first row to the others makes their entries 0 or ±2, so the determinant is a multiple of 2^(n−1), and one below
    half of that is zero. A float64 determinant is off by far less than that for n ≤ 20.

    Args:
        signs: (..., n, n), n ≤ 20.
    """
    size: Tensor = torch.linalg.det(signs.double()).abs()
    return size < 2.0 ** (signs.shape[-1] - 2)


def all_signs(n: int) -> Tensor:
    """All n×n matrices of entries ±1 whose first row and column are +1: turning signs of rows and columns keeps the rank."""
    free = (n - 1) ** 2
    bits = (torch.arange(2**free)[:, None] >> torch.arange(free)) & 1
    made = torch.ones(2**free, n, n)
    made[:, 1:, 1:] = (2.0 * bits - 1).view(-1, n - 1, n - 1)
    return made


def rounding_norm(x: Tensor, generator: torch.Generator) -> float:
    """‖E‖₂ of errors as rounding to bfloat16 makes them: independent, uniform in half a spacing to either side of each entry.

    Drawn rather than taken, because matrices that are kept in bfloat16 have no error of their own left.
    """
    _, exponent = torch.frexp(x)
    spacing = torch.ldexp(torch.ones_like(x), exponent - BITS_OF_BFLOAT16)
    errors = (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5) * spacing * (x != 0)
    return float(torch.linalg.matrix_norm(errors, 2))


def full_rank(values: Tensor, *, size: int, dtype: torch.dtype) -> Tensor:
    """Whether σ_min > σ_max · size · ε, the usual rule of numerical rank, of falling singular values (..., r)."""
    return values[..., -1] > values[..., 0] * size * torch.finfo(dtype).eps
