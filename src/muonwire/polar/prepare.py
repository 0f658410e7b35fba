"""Bringing a matrix into the dtype and range of the products."""

import math

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.buffers import buffer
from muonwire.polar.gram import kept_gram

NONFINITE = ("raise", "propagate")
# ‖X‖_F² within this range leaves room for c₂/σ⁵ and R² in float32's and bfloat16's range of exponents.
SMALLEST_TRACE = 1e-10
LARGEST_TRACE = 1e10


def prepare(x: Tensor, *, dtype: torch.dtype, nonfinite: str) -> tuple[Tensor, Tensor] | Tensor:
    """Cast one matrix to the dtype of the products, scaled where its norm is extreme.

    The trace of the Gram matrix, which is needed anyway, is ‖X‖_F²; so an ordinary matrix is read once, by
    the cast.

    Args:
        x: (m, n), not empty.
        dtype: of the products.
        nonfinite: "raise" or "propagate".

    Returns:
        the matrix in the dtype of the products and its Gram matrix, or the polar factor itself: zeros of a zero matrix, NaN of a
        non-finite one that is to be propagated.

    Raises:
        UsageError: x has a value that is not finite, and nonfinite is "raise".
    """
    y = buffer("input", tuple(x.shape), dtype, x.device).copy_(x)
    gram = kept_gram(y)
    trace = float(gram.diagonal().sum(dtype=torch.float32))
    if dtype != torch.float16 and SMALLEST_TRACE <= trace <= LARGEST_TRACE:
        return y, gram
    largest = float(x.abs().amax())
    if not largest < float("inf"):
        if nonfinite == "raise":
            raise UsageError(nonfinite_message(x))
        return torch.full_like(x, float("nan"))
    if largest == 0.0:
        return torch.zeros_like(x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) / largest
    if dtype == torch.float16:
        wide = wide / torch.linalg.vector_norm(wide)
    y.copy_(wide)
    return y, kept_gram(y)


def nonfinite_message(x: Tensor) -> str:
    """Which values of x are not finite, and what to do about them."""
    bad = (~torch.isfinite(x)).nonzero()
    first = tuple(int(i) for i in bad[0])
    return (
        f"polar: x has {len(bad)} values that are not finite, the first at {first} ({float(x[first])}); a polar factor "
        f"needs finite input. Skip the step or clip the gradient, or pass nonfinite='propagate' to get NaN for that matrix"
    )


def guard(x: Tensor, result: Tensor, *, nonfinite: str) -> Tensor:
    """``result``, made of ``x``; its sum is read only where what is not finite raises.

    Args:
        x: (..., m, n).
        result: (..., m, n), not finite where x is not.
        nonfinite: "raise" or "propagate".

    Raises:
        UsageError: x has a value that is not finite, and nonfinite is "raise".
    """
    if nonfinite == "raise" and not math.isfinite(result.sum()) and not bool(torch.isfinite(x).all()):
        raise UsageError(nonfinite_message(x))
    return result
