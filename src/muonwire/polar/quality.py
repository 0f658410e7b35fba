"""How good a polar factor is: the sources' measures, each under its own name."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.exact import svd_polar


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measures of one approximate polar factor P of one X (r = min(m, n); G the smaller of P Pᵀ and Pᵀ P).

    Args:
        polar_error: ‖P − U Vᵀ‖_F / ‖U Vᵀ‖_F, against the exact factor.
        orthogonality_error: ‖G − I‖_F / √r, the lab's and the conflict claims' measure.
        orthogonality_max: max |G − I| entry by entry.
        orthogonality_spectral: ‖G − I‖₂ = max |s² − 1|.
        smallest: smallest singular value of P.
        largest: largest singular value of P.
        alignment: ⟨P, X⟩ / ‖X‖_* in [−1, 1]: 1 exactly when P attains the nuclear norm, as the polar factor
            does.
        cosine: ⟨P, X⟩ / (‖P‖_F ‖X‖_F).
        input_rank: numerical rank of X.
        rank: numerical rank of P.
    """

    polar_error: float
    orthogonality_error: float
    orthogonality_max: float
    orthogonality_spectral: float
    smallest: float
    largest: float
    alignment: float
    cosine: float
    input_rank: int
    rank: int


def exact_factor(x: Tensor) -> Tensor:
    """U Vᵀ in float64, from a float64 SVD.

    Directions of singular values below 8 eps σ_max count as zero: eps of float64 for float64 input, else of
    float32, in which narrower input was made.

    Args:
        x: (..., m, n).

    >>> exact_factor(3 * torch.eye(2)).dtype
    torch.float64
    """
    made_in = torch.float64 if x.dtype == torch.float64 else torch.float32
    return svd_polar(x.double(), resolution=8 * torch.finfo(made_in).eps)


def polar_error(p: Tensor, x: Tensor, *, exact: Tensor | None = None) -> float:
    """‖P − U Vᵀ‖_F / ‖U Vᵀ‖_F with the exact factor from a float64 SVD; 0 for a zero P of a zero X.

    Args:
        p: (m, n), the approximation.
        x: (m, n), what it approximates the factor of.
        exact: ``exact_factor(x)`` where the caller has it.

    >>> polar_error(torch.eye(2), 3 * torch.eye(2))
    0.0
    """
    _check(p, x)
    exact = exact_factor(x) if exact is None else exact
    size = float(torch.linalg.vector_norm(exact))
    distance = float(torch.linalg.vector_norm(p.double() - exact))
    return distance / size if size else distance


def orthogonality_error(p: Tensor) -> float:
    """‖G − I‖_F / √r, in float64; G is the smaller Gram matrix of P.

    Args:
        p: (m, n).

    >>> orthogonality_error(torch.eye(2, 5))
    0.0
    """
    gram = _gram_error(p)
    return float(torch.linalg.vector_norm(gram)) / math.sqrt(gram.shape[0])


def numerical_rank(x: Tensor, *, eps: float | None = None) -> int:
    """Number of singular values above σ_max · max(m, n) · eps.

    Args:
        x: (m, n).
        eps: relative resolution. Default: that of the dtype of ``x``.

    >>> numerical_rank(torch.diag(torch.tensor([1.0, 1e-3, 0.0])))
    2
    """
    values = torch.linalg.svdvals(x.double())
    if values.numel() == 0:
        return 0
    resolution = (torch.finfo(x.dtype).eps if eps is None else eps) * max(x.shape)
    return int((values > values[0] * resolution).sum())


def quality(p: Tensor, x: Tensor) -> Quality:
    """Every measure of P as the polar factor of X, in float64.

    Args:
        p: (m, n), the approximation.
        x: (m, n), finite and not zero.

    Raises:
        UsageError: shapes differ or are not of one matrix.

    >>> x = torch.diag(torch.tensor([4.0, 1.0]))
    >>> found = quality(torch.eye(2), x)
    >>> found.polar_error, found.alignment, found.rank
    (0.0, 1.0, 2)
    """
    _check(p, x)
    gram = _gram_error(p)
    values = torch.linalg.svdvals(p.double())
    input_values = torch.linalg.svdvals(x.double())
    inner = float((p.double() * x.double()).sum())
    norms = float(torch.linalg.vector_norm(p.double()) * torch.linalg.vector_norm(x.double()))
    nuclear = float(input_values.sum())
    return Quality(
        polar_error=polar_error(p, x),
        orthogonality_error=float(torch.linalg.vector_norm(gram)) / math.sqrt(gram.shape[0]),
        orthogonality_max=float(gram.abs().max()),
        orthogonality_spectral=float((values**2 - 1).abs().max()),
        smallest=float(values[-1]),
        largest=float(values[0]),
        alignment=inner / nuclear if nuclear else 0.0,
        cosine=inner / norms if norms else 0.0,
        input_rank=numerical_rank(x),
        rank=numerical_rank(p),
    )


def _gram_error(p: Tensor) -> Tensor:
    wide = p.double()
    gram = wide @ wide.mT if p.shape[0] <= p.shape[1] else wide.mT @ wide
    return gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)


def _check(p: Tensor, x: Tensor) -> None:
    if p.ndim != 2 or p.shape != x.shape:
        raise UsageError(
            f"quality: p is {tuple(p.shape)} and x {tuple(x.shape)}; it takes one matrix (m, n) and its factor"
        )
