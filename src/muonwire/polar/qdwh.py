"""QDWH: dynamically weighted Halley iteration, six iterations for any condition number."""

import torch
from torch import Tensor

MAX_ITERATIONS = 12
# Past this c the Cholesky form would square a condition number of about √c; the QR form does not.
LARGEST_CHOLESKY_WEIGHT = 100.0


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
    for _ in range(MAX_ITERATIONS):
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
