"""Exact polar factors: by the SVD, by the eigenvalues of the Gram matrix, by Newton's and by QDWH's iteration."""

from collections.abc import Callable

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.gram import gram_matrix
from muonwire.polar.prepare import nonfinite_message

# Most iterations of each; both stop before, once an iteration changes nothing.
NEWTON_ITERATIONS, QDWH_ITERATIONS = 30, 12
# Past this c the Cholesky form would square a condition number of about √c; the QR form does not.
LARGEST_CHOLESKY_WEIGHT = 100.0


def exact_polar(x: Tensor, *, method: str, dtype: torch.dtype | None, nonfinite: str) -> Tensor:
    """Polar factor of each matrix by one of ``EXACT``, at any scale.

    Args:
        x: (..., m, n), floating, not empty.
        method: a name of ``EXACT``.
        dtype: of the factorization. Default: float32, or that of ``x`` if wider.
        nonfinite: "raise" or "propagate".

    Returns:
        (..., m, n) in ``dtype``; zeros for a zero matrix, NaN for one that is not finite.

    Raises:
        UsageError: x has a value that is not finite, and nonfinite is "raise".
    """
    wide = x.to(dtype or torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        if nonfinite == "raise":
            raise UsageError(nonfinite_message(x))
        wide, largest = torch.where(finite, wide, 0.0), torch.where(finite, largest, 1.0)
    zero = largest == 0
    # A zero matrix has no inverse for newton; the identity stands in for it and is masked.
    eye = torch.eye(*x.shape[-2:], dtype=wide.dtype, device=x.device)
    result = EXACT[method](torch.where(zero, eye, wide / torch.where(zero, 1.0, largest)))
    result = torch.where(zero, 0.0, result)
    return torch.where(finite, result, float("nan"))


def svd_polar(x: Tensor, *, resolution: float | None = None) -> Tensor:
    """U Vᵀ from the singular value decomposition; directions below σ_max · resolution are left out.

    Args:
        x: (..., m, n), float32 or float64.
        resolution: relative. Default: eps · max(m, n).

    >>> torch.allclose(svd_polar(torch.diag(torch.tensor([3.0, 0.5]))), torch.eye(2))
    True

    Source: Higham, Functions of Matrices (2008), theorem 8.1.
    """
    left: Tensor
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    eps = torch.finfo(values.dtype).eps * max(x.shape[-2:])
    resolved = (values > values[..., :1] * (eps if resolution is None else resolution)).to(x.dtype)
    factor: Tensor = (left * resolved.unsqueeze(-2)) @ right
    return factor


def eigh_polar(x: Tensor) -> Tensor:
    """(X Xᵀ)^(−½) X from the eigendecomposition of the smaller Gram matrix.

    Cheaper than the SVD when one dim is much smaller, but the Gram matrix squares the condition number:
    singular values below σ_max √(eps r) are rounding and left out.

    Args:
        x: (..., m, n), float32 or float64.

    >>> torch.allclose(eigh_polar(torch.diag(torch.tensor([3.0, 0.5]))), torch.eye(2))
    True

    Source: Higham, Functions of Matrices (2008), section 8.1: U = A (A* A)^(−½).
    """
    tall = x.shape[-2] > x.shape[-1]
    gram = gram_matrix(x)
    values, vectors = torch.linalg.eigh(gram)
    eps = torch.finfo(values.dtype).eps * gram.shape[-1]
    floor = values[..., -1:] * eps
    # max() keeps the root real; those entries are masked.
    scales = torch.where(values > floor, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    root: Tensor = (vectors * scales.unsqueeze(-2)) @ vectors.mT
    return x @ root if tall else root @ x


def scaled_newton(x: Tensor) -> Tensor:
    """X ← (μ X + X⁻ᵀ/μ)/2 with μ = (‖X⁻¹‖₁‖X⁻¹‖_∞ / (‖X‖₁‖X‖_∞))^¼, after a QR factorization for m ≠ n.

    The scaling makes the first iterations bring all singular values near 1 whatever the condition number;
    without it a condition number κ costs log₂ κ of them.

    Args:
        x: (..., m, n) of full rank, float32 or float64.

    Returns:
        (..., m, n); NaN for a matrix whose smaller dim is not of full rank.

    >>> torch.allclose(scaled_newton(torch.diag(torch.tensor([3.0, 0.5]))), torch.eye(2), atol=1e-6)
    True

    Source: Higham, "Computing the polar decomposition - with applications" (1986); Functions of Matrices,
    section 8.6.
    """
    m, n = x.shape[-2:]
    if m < n:
        return scaled_newton(x.mT).mT
    if m > n:
        q: Tensor
        q, r = torch.linalg.qr(x)
        return q @ scaled_newton(r)
    eps = torch.finfo(x.dtype).eps
    scaling = True
    for _ in range(NEWTON_ITERATIONS):
        inverse, info = torch.linalg.inv_ex(x)
        if bool((info != 0).any()):
            inverse = torch.where((info != 0)[..., None, None], float("nan"), inverse)
        mu = torch.ones_like(x[..., :1, :1])
        if scaling:
            mu = (_norms(inverse) / _norms(x)) ** 0.25
        after = (mu * x + inverse.mT / mu) / 2
        change = torch.linalg.vector_norm(after - x, dim=(-2, -1)) / torch.linalg.vector_norm(
            after, dim=(-2, -1)
        )
        x = after
        largest = float(change.nan_to_num(0.0).max())
        # Near the limit the norms only add rounding to a μ of 1.
        scaling = scaling and largest > 1e-2
        if largest <= n * eps:
            break
    return x


def _norms(x: Tensor) -> Tensor:
    ones = x.abs().sum(dim=-2).amax(dim=-1)
    rows = x.abs().sum(dim=-1).amax(dim=-1)
    return (ones * rows)[..., None, None]


def qdwh(x: Tensor, *, lower: float | None = None) -> Tensor:
    """Polar factor of each matrix: X ← X (a I + b XᵀX)(I + c XᵀX)⁻¹ with weights that follow σ_min.

    While c is large, by the QR factorization [√c X; I] = [Q₁; Q₂] R, which is backward stable:
    X ← (b/c) X + (a − b/c)/√c · Q₁ Q₂ᵀ. After that by Cholesky of I + c XᵀX, which is cheaper.

    Args:
        x: (..., m, n), float32 or float64; zero matrices give zeros.
        lower: lower bound of σ_min/‖X‖_F. Default: the eps of the dtype.

    Returns:
        (..., m, n).

    >>> torch.allclose(qdwh(torch.diag(torch.tensor([3.0, 0.5]))), torch.eye(2), atol=1e-6)
    True

    Source: Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration" (2010).
    """
    m, n = x.shape[-2:]
    if m < n:
        return qdwh(x.mT, lower=lower).mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / torch.where(norm == 0, 1.0, norm)
    eps = torch.finfo(x.dtype).eps
    low = eps if lower is None else lower
    eye = torch.eye(n, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], n, n)
    for _ in range(QDWH_ITERATIONS):
        a, b, c = halley_weights(low)
        if c > LARGEST_CHOLESKY_WEIGHT:
            q, _r = torch.linalg.qr(torch.cat([c**0.5 * x, eye], dim=-2))
            x = (b / c) * x + ((a - b / c) / c**0.5) * (q[..., :m, :] @ q[..., m:, :].mT)
        else:
            factor = torch.linalg.cholesky(eye + c * (x.mT @ x))
            x = (b / c) * x + (a - b / c) * torch.cholesky_solve(x.mT, factor).mT
        done = 1 - low <= 4 * eps
        low = min(low * (a + b * low * low) / (1 + c * low * low), 1.0)
        if done:
            break
    return x


def halley_weights(lower: float) -> tuple[float, float, float]:
    """a, b, c of x (a + b x²)/(1 + c x²), the best such map of [lower, 1] toward 1.

    Args:
        lower: 0 < lower ≤ 1.

    >>> [round(w, 6) for w in halley_weights(1.0)]
    [3.0, 1.0, 3.0]
    """
    square = lower * lower
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    root = (1 + d) ** 0.5
    a = root + 0.5 * (8 - 4 * d + 8 * (2 - square) / (square * root)) ** 0.5
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": svd_polar,
    "eigh": eigh_polar,
    "newton": scaled_newton,
    "qdwh": qdwh,
}
