"""Power iteration with QR: the leading part of the polar factor, warm-started from the last call."""

from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.orthonormal import householder


@dataclass(frozen=True, kw_only=True)
class PowerFactors:
    """What one power iteration gives.

    Args:
        left: (..., m, rank), orthonormal columns P.
        right: (..., n, rank), R = Xᵀ P; P Rᵀ is X's projection, what an error feedback takes out of X.
        state: (..., n, rank), R with columns of unit length: where the next call starts.
    """

    left: Tensor
    right: Tensor
    state: Tensor

    @property
    def update(self) -> Tensor:
        """P times the normalized Rᵀ, (..., m, n): nearly the polar factor of X's leading part."""
        return self.left @ self.state.mT


def initial_state(x: Tensor, *, rank: int, seed: int = 0) -> Tensor:
    """Random orthonormal start, the same on every replica.

    Args:
        x: (..., m, n), for shape, dtype and device.
        rank: columns, 1 … min(m, n).
        seed: of the generator. Default: 0.

    Returns:
        (..., n, rank).

    Raises:
        UsageError: rank is out of range.

    >>> initial_state(torch.zeros(4, 6), rank=2).shape
    torch.Size([6, 2])
    """
    m, n = x.shape[-2:]
    if not 1 <= rank <= min(m, n):
        raise UsageError(f"initial_state: rank is {rank!r}; for {m}x{n} it takes 1 ... {min(m, n)}")
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(*x.shape[:-2], n, rank, generator=generator, device="cpu")
    return householder(start).to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def power_iteration(x: Tensor, state: Tensor) -> PowerFactors:
    """P = qr(X Q), R = Xᵀ P, Q ← R with unit columns: one step of subspace iteration per call.

    Called on a slowly changing X (a momentum) with the state of the last call, P and Q approach the leading
    singular vectors. The memory and the traffic are (m + n) · rank.

    Args:
        x: (..., m, n).
        state: (..., n, rank), from ``initial_state`` or the last call.

    Returns:
        the factors; zero columns where X is zero.

    Raises:
        UsageError: the state's shape does not fit.

    >>> x = torch.diag(torch.tensor([3.0, 2.0, 1e-3]))
    >>> factors = power_iteration(x, initial_state(x, rank=3))
    >>> torch.allclose(factors.left @ factors.right.mT, x, atol=1e-5)
    True

    Source: Ahn et al., "Dion: distributed orthonormalized updates", arXiv 2504.05295, algorithm 1.
    """
    if state.shape[:-1] != (*x.shape[:-2], x.shape[-1]):
        raise UsageError(
            f"power_iteration: the state is {tuple(state.shape)} for x of {tuple(x.shape)}; it takes "
            "(..., n, rank) with x's batch and n; make one with initial_state"
        )
    wide = x.to(state.dtype)
    product = wide @ state
    left = householder(product)
    left = torch.where(torch.linalg.vector_norm(product, dim=(-2, -1), keepdim=True) > 0, left, 0.0)
    right = wide.mT @ left
    length = torch.linalg.vector_norm(right, dim=-2, keepdim=True)
    # A column that X does not reach keeps its old direction, so that the state stays of full rank.
    fresh = torch.where(length > 0, right / torch.where(length > 0, length, 1.0), state)
    return PowerFactors(left=left, right=right, state=fresh)
