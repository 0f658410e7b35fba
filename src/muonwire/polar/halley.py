"""One weighted Halley step and one quintic: the cheapest polar factor where 16 bits gain nothing, whatever the spectrum."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from muonwire.polar.exact import halley_weights
from muonwire.polar.gram import gram_matrix, symmetric_flops
from muonwire.polar.minimax import Values, evaluate, minimax_odd
from muonwire.polar.newton_schulz import normalized
from muonwire.polar.prepare import LARGEST_TRACE, SMALLEST_TRACE, guard

# Both steps are the best ones for singular values from here to 1. What lies below is multiplied by 964 (by five steps of
# torch.optim.Muon: by 485). The Cholesky factorization has a condition number of at most 1 + c = 16,001: fine in float32.
LOWER = 1e-3
# What lies above ends this close to 1.
HALLEY_ERROR = 0.157
# A Cholesky factorization with its inverse, r³ FLOPs, takes about the time of products of so many times as many.
FACTOR_COST = 2


@lru_cache(maxsize=1)
def _coefficients() -> tuple[tuple[float, float, float], tuple[float, ...]]:
    """a, b, c of the Halley step on [LOWER, 1], and the coefficients of the quintic on what that makes of it."""
    a, b, c = halley_weights(LOWER)
    mapped = LOWER * (a + b * LOWER**2) / (1 + c * LOWER**2)
    return (a, b, c), minimax_odd(lower=mapped, upper=1.0, degree=5)[0]


def halley_polar(x: Tensor, *, dtype: torch.dtype, nonfinite: str = "propagate") -> Tensor:
    """Polar factor of each matrix of ``x``, scaled by ‖X‖_F, which is the root of the Gram matrix's trace.

    Args:
        x: (..., m, n), any floating dtype, any scale.
        dtype: of the products: float32 or float64.
        nonfinite: "raise" or "propagate". Default: "propagate".

    Returns:
        (..., m, n) in ``dtype``; zeros for a zero matrix, NaN for one that is not finite.

    Raises:
        UsageError: x has a value that is not finite, and nonfinite is "raise".
    """
    y = x.to(dtype)
    gram = gram_matrix(y)
    if y.ndim == 2:
        # One usual matrix: few operations, each of which costs microseconds.
        square = gram.trace().item()
        if SMALLEST_TRACE <= square <= LARGEST_TRACE:
            return halley(y, gram=gram, upper=math.sqrt(square))
    else:
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
        if bool(((trace >= SMALLEST_TRACE) & (trace <= LARGEST_TRACE)).all()):
            return halley(y, gram=gram, upper=trace.sqrt())
    return guard(x, halley(normalized(x, dtype=dtype)), nonfinite=nonfinite)


def halley(x: Tensor, *, gram: Tensor | None = None, upper: float | Tensor = 1.0) -> Tensor:
    """Polar factor of each matrix of ``x`` by one Cholesky factorization and few products.

    X₁ = X (a I + b XᵀX)(I + c XᵀX)⁻¹, the weighted Halley step, takes [LOWER, 1] to [0.25, 1]; then X₂ = c₀ X₁ + c₁ A X₁ + c₂ A² X₁
    with A = X₁ X₁ᵀ, the best quintic there. Where max(m, n) > 1.5 min(m, n), in the Gram form: with R = X Xᵀ the first step is
    X₁ = M X for M = (b/c) I + (a − b/c)(I + c R)⁻¹, which commutes with R; so A = M R M, and X is multiplied once, at the end.

    Args:
        x: (..., m, n), float32 or float64.
        gram: (..., r, r), r = min(m, n): X Xᵀ, or XᵀX of a tall x, where the caller has it.
        upper: no singular value is larger; a number, or (..., 1, 1). Default: 1.

    Returns:
        (..., m, n). Singular values from ``LOWER`` to 1 times ``upper`` end within ``HALLEY_ERROR`` of 1, smaller ones are
        multiplied by 964/``upper`` at most. NaN where x has NaN.

    >>> q = halley(torch.diag(torch.tensor([1.0, 0.5])))
    >>> bool((q - torch.eye(2)).abs().max() < HALLEY_ERROR)
    True

    Source: Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration" (2010), the weights and the form with one Cholesky
    factorization; Amsel et al., "The Polar Express", arXiv 2505.16932, the best quintic.
    """
    if x.shape[-2] > x.shape[-1]:
        return halley(x.mT, gram=gram, upper=upper).mT
    if x.ndim > 3:
        gram = None if gram is None else gram.flatten(0, -3)
        upper = upper.flatten(0, -3) if isinstance(upper, Tensor) else upper
        return halley(x.flatten(0, -3), gram=gram, upper=upper).reshape(x.shape)
    (a, b, c), (c0, c1, c2) = _coefficients()
    gram = x @ x.mT if gram is None else gram
    eye = _eye(gram.shape[-1], gram.dtype, gram.device)
    # Not the variant that raises: of a matrix with NaN the result is NaN. σ/upper is what the steps are made for.
    factor: Tensor = torch.linalg.cholesky_ex(_plus(eye, gram, c / upper**2)).L
    ratio, scale = b / c / (a - b / c), (a - b / c) / upper
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    if in_gram_form(x.shape[-2], x.shape[-1]):
        first = torch.add(torch.cholesky_inverse(factor), eye, alpha=ratio) * scale
        square = first @ gram @ first
        return add(first, add(square, square, square, beta=c1, alpha=c2), first, beta=c0) @ x
    y = torch.add(torch.cholesky_solve(x, factor), x, alpha=ratio) * scale
    square = y @ y.mT
    return add(y, add(square, square, square, beta=c1, alpha=c2), y, beta=c0)


def halley_map(values: Values) -> Values:
    """What the two steps make of singular values.

    Args:
        values: at most 1.

    >>> import numpy as np
    >>> [round(float(v), 3) for v in halley_map(np.array([1e-4, LOWER, 1.0]))]
    [0.096, 0.843, 1.157]
    """
    (a, b, c), quintic = _coefficients()
    return evaluate(quintic, values * (a + b * values**2) / (1 + c * values**2))


def halley_flops(m: int, n: int, *, blocks: bool = False) -> int:
    """FLOPs of ``halley`` on one m×n matrix, the factorization and its solves among them.

    Args:
        m, n: rows and columns.
        blocks: the Gram matrix is made by blocks.

    >>> halley_flops(1, 2), halley_flops(4, 4) // 4**3
    (17, 10)
    """
    r, s = min(m, n), max(m, n)
    gram = symmetric_flops(r, s, blocks=blocks)
    if in_gram_form(r, s):
        return gram + r**3 + 2 * r**3 * 4 + 2 * r * r * s
    return gram + r**3 // 3 + 2 * r * r * s * 3 + 2 * r**3


def halley_cost(m: int, n: int, *, blocks: bool = False) -> int:
    """FLOPs of products that take the time of ``halley``; the arguments are those of ``halley_flops``."""
    return halley_flops(m, n, blocks=blocks) + (FACTOR_COST - 1) * min(m, n) ** 3


def in_gram_form(r: int, s: int) -> bool:
    """Whether ``halley`` multiplies an r×s matrix, r ≤ s, at the end only."""
    return 2 * s > 3 * r


def _plus(eye: Tensor, gram: Tensor, weight: float | Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return torch.addcmul(eye, gram, weight)
    return torch.add(eye, gram, alpha=weight)


@lru_cache(maxsize=64)
def _eye(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Outside inference mode, or a later call that records gradients could not use it.
    with torch.inference_mode(False):
        return torch.eye(r, dtype=dtype, device=device)
