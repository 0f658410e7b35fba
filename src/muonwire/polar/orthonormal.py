"""Orthonormal bases by QR and Gram-Schmidt: they span what the polar factor spans, but turned."""

from collections.abc import Callable

import torch
from torch import Tensor

from muonwire.errors import UsageError


def householder(x: Tensor) -> Tensor:
    """Q of X = Q R by Householder reflections, with the diagonal of R positive; of Xᵀ for m < n.

    Orthonormal to rounding whatever the condition number, but it depends on the order of the columns: the
    polar factor is the orthonormal matrix nearest to X, Q the one that keeps the first column's direction.

    Args:
        x: (..., m, n), float32 or float64.

    Source: Golub and Van Loan, Matrix Computations (2013), section 5.2.
    """
    if x.shape[-2] < x.shape[-1]:
        return householder(x.mT).mT
    q: Tensor
    q, r = torch.linalg.qr(x)
    signs = torch.sgn(torch.diagonal(r, dim1=-2, dim2=-1))
    return q * torch.where(signs == 0, 1.0, signs).unsqueeze(-2)


def classical_gram_schmidt(x: Tensor) -> Tensor:
    """Each column minus its projections on the earlier ones, all at once; loses orthogonality as κ² eps.

    Args:
        x: (..., m, n), floating; a column in the span of the earlier ones gives zeros.

    Source: Golub and Van Loan, Matrix Computations (2013), section 5.2.7.
    """
    if x.shape[-2] < x.shape[-1]:
        return classical_gram_schmidt(x.mT).mT
    q = torch.zeros_like(x)
    for j in range(x.shape[-1]):
        known, column = q[..., :j], x[..., j : j + 1]
        q[..., j : j + 1] = _unit(column - known @ (known.mT @ column), column)
    return q


def modified_gram_schmidt(x: Tensor) -> Tensor:
    """Each column is taken out of all later ones at once; loses orthogonality as κ eps.

    Args:
        x: (..., m, n), floating; a column in the span of the earlier ones gives zeros.

    Source: Björck, "Solving linear least squares problems by Gram-Schmidt orthogonalization" (1967).
    """
    if x.shape[-2] < x.shape[-1]:
        return modified_gram_schmidt(x.mT).mT
    q = x.clone()
    for j in range(x.shape[-1]):
        column = _unit(q[..., j : j + 1], x[..., j : j + 1])
        q[..., j : j + 1] = column
        rest = q[..., j + 1 :]
        rest -= column @ (column.mT @ rest)
    return q


def _unit(column: Tensor, before: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
    start = torch.linalg.vector_norm(before, dim=-2, keepdim=True)
    # What is left of a dependent column is rounding, and its direction means nothing.
    kept = norm > 4 * torch.finfo(column.dtype).eps * start
    return torch.where(kept, column / torch.where(kept, norm, 1.0), 0.0)


BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "householder": householder,
    "classical_gram_schmidt": classical_gram_schmidt,
    "modified_gram_schmidt": modified_gram_schmidt,
}


def orthonormal_basis(x: Tensor, *, method: str = "householder") -> Tensor:
    """Orthonormal columns (rows for m < n) with the span of X's.

    Args:
        x: (..., m, n), floating; 16-bit input is computed in float32.
        method: "householder", "classical_gram_schmidt" or "modified_gram_schmidt". Default: "householder".

    Returns:
        (..., m, n), in the dtype of ``x``.

    Raises:
        UsageError: method is unknown.

    >>> torch.equal(orthonormal_basis(torch.tensor([[2.0, 2.0], [0.0, 1.0]])), torch.eye(2))
    True
    """
    if method not in BASES:
        raise UsageError(f"orthonormal_basis: method is {method!r}; allowed are {', '.join(BASES)}")
    if x.numel() == 0:
        return x.clone()
    return BASES[method](x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
