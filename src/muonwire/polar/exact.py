"""Exact polar factors by a factorization of the matrix or of its Gram matrix."""

import torch
from torch import Tensor


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
    gram = x.mT @ x if tall else x @ x.mT
    values, vectors = torch.linalg.eigh(gram)
    eps = torch.finfo(values.dtype).eps * gram.shape[-1]
    floor = values[..., -1:] * eps
    # max() keeps the root real; those entries are masked.
    scales = torch.where(values > floor, values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    root: Tensor = (vectors * scales.unsqueeze(-2)) @ vectors.mT
    return x @ root if tall else root @ x
