"""The Gram form: the polynomial is evaluated on the small Gram matrix, which is made by blocks where that is faster."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.buffers import buffer
from muonwire.polar.schedules import Schedule, Step

NUM_BLOCKS = 4
# Measured on CPU: four blocks save up to 30 % of the time of a Gram matrix with a long inner dim. They lose
# where the copies weigh as much as the products saved; r×r products gain nothing in 16 bits.
SMALLEST = 512
LONG_16_BIT, LONG_32_BIT = 2, 1


def gram_matrix(y: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The smaller of Y Yᵀ and Yᵀ Y: (..., r, r) with r = min(m, n)."""
    r, s = min(y.shape[-2:]), max(y.shape[-2:])
    if y.ndim == 2 and out is not None and uses_blocks(r, s, dtype=y.dtype, device=y.device):
        return symmetric_gram(y, out=out)
    left, right = (y.mT, y) if y.shape[-2] > y.shape[-1] else (y, y.mT)
    return torch.matmul(left, right, out=out) if out is not None else left @ right


def kept_gram(y: Tensor) -> Tensor:
    """``gram_matrix`` of one matrix, in the buffer that this thread keeps for it."""
    r = min(y.shape)
    return gram_matrix(y, out=buffer("gram", (r, r), y.dtype, y.device))


def uses_blocks(r: int, s: int, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the Gram matrix of an r×s matrix is made by blocks.

    Args:
        r, s: the smaller and the larger dim.
        dtype: of the product.
        device: where; only on CPU has it been measured to be faster.

    >>> uses_blocks(512, 2048, dtype=torch.bfloat16, device=torch.device("cpu"))
    True
    """
    long = LONG_16_BIT if dtype.itemsize == 2 else LONG_32_BIT
    return device.type == "cpu" and r >= SMALLEST and s >= long * r


def symmetric_flops(r: int, s: int, *, blocks: bool) -> int:
    """FLOPs of the Gram matrix of an r×s matrix.

    >>> symmetric_flops(4, 8, blocks=True) / symmetric_flops(4, 8, blocks=False)
    0.625
    """
    if not blocks:
        return 2 * r * r * s
    return sum(2 * (last - first) * last * s for first, last in _bounds(r))


def symmetric_gram(y: Tensor, *, out: Tensor) -> Tensor:
    """The smaller of Y Yᵀ and Yᵀ Y for one matrix, by blocks; as symmetric as a product of one block.

    Args:
        y: (m, n).
        out: (r, r), r = min(m, n).

    >>> y = torch.arange(15.0).view(5, 3)
    >>> torch.equal(symmetric_gram(y, out=torch.empty(3, 3)), y.mT @ y)
    True
    """
    rows = y.mT if y.shape[0] > y.shape[1] else y
    for first, last in _bounds(rows.shape[0]):
        torch.mm(rows[first:last], rows[:last].mT, out=out[first:last, :last])
        out[:first, first:last].copy_(out[first:last, :first].mT)
    return out


def _bounds(r: int) -> list[tuple[int, int]]:
    edges = [r * i // NUM_BLOCKS for i in range(NUM_BLOCKS + 1)]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def scaled(step: Step, scale: float) -> Step:
    """The step for X when it was made for X / scale: cⱼ / scale^(2j+1)."""
    return tuple(c / scale ** (2 * j + 1) for j, c in enumerate(step))


def weight(gram: Tensor, step: Step, *, out: Tensor, spare: Tensor) -> Tensor:
    """W = c₀ I + c₁ R + c₂ R² + c₃ R³ for one (r, r) Gram matrix R; none, one or two products.

    c₀ and c₁ are summed before the product is added: each alone is several times their sum, and rounding
    that sum loses less than rounding them apart.

    Args:
        gram: R.
        step: c₀, c₁, …
        out: where W goes.
        spare: same shape; overwritten for degree 7.
    """
    torch.mul(gram, step[1], out=out)
    out.diagonal().add_(step[0])
    if len(step) == 3 and step[2] != 0:
        out.addmm_(gram, gram, alpha=step[2])
    elif len(step) == 4:
        torch.mul(gram, step[3], out=spare)
        spare.diagonal().add_(step[2])
        square = torch.mm(gram, gram, out=buffer("square", tuple(gram.shape), gram.dtype, gram.device))
        out.addmm_(square, spare)
    return out


def gram_iteration(
    y: Tensor,
    *,
    schedule: Schedule,
    restarts: Sequence[int] = (),
    scale: float = 1.0,
    gram: Tensor | None = None,
) -> Tensor:
    """Polar factor of one matrix by the Gram form of a polynomial iteration.

    With R = Y Yᵀ, Q = I and W = c₀ I + c₁ R + … at every step: Q ← Q W, R ← W R W; the result is Q Y. A
    restart before step k sets Y ← Q Y, R ← Y Yᵀ, Q ← I, which removes from R the rounding errors that the
    steps before it amplified. Restarting before every step is the plain iteration, Y ← W Y. Tall matrices
    use Yᵀ Y and Y Q, without a transpose.

    Args:
        y: (m, n), in the dtype of the products.
        schedule: the coefficients.
        restarts: ascending steps in 1 … len(schedule) − 1 before which to restart.
        scale: singular values are divided by it; it enters the first step's coefficients, not the matrix.
        gram: ``gram_matrix(y)`` where the caller has it already; overwritten.

    Returns:
        (m, n), a new tensor of the dtype of ``y``.

    Raises:
        UsageError: restarts are not as above.

    >>> from muonwire.polar.schedules import TAYLOR_QUINTIC
    >>> q = gram_iteration(torch.eye(2, 3) * 0.5, schedule=TAYLOR_QUINTIC)
    >>> torch.allclose(q, torch.eye(2, 3), atol=1e-6)
    True

    Source: Dao-AILab, "Gram Newton-Schulz" (2026), for the form.
    """
    bounds = [0, *restarts, len(schedule)]
    if any(a >= b for a, b in pairwise(bounds)):
        raise UsageError(
            f"gram_iteration: restarts are {tuple(restarts)}; they must ascend within 1 ... {len(schedule) - 1}"
        )
    tall = y.shape[0] > y.shape[1]
    r = min(y.shape)

    def square(slot: str) -> Tensor:
        return buffer(slot, (r, r), y.dtype, y.device)

    gram = kept_gram(y) if gram is None else gram
    for segment, (first, last) in enumerate(pairwise(bounds)):
        total = None
        for index in range(first, last):
            step = schedule.coefficients[index]
            step = scaled(step, scale) if index == 0 else step
            w = weight(gram, step, out=square("weight"), spare=square("half"))
            if index + 1 < last:
                half = torch.mm(gram, w, out=square("half"))
                torch.mm(half, w, out=gram)
            if total is None:
                # The weight's buffer is overwritten by the next step, so the running product takes another.
                total = w if index + 1 == last else square("total0").copy_(w)
            else:
                total = torch.mm(total, w, out=square(f"total{(index - first) % 2}"))
        assert total is not None, "a segment has at least one step"
        final = last == len(schedule)
        out = None if final else buffer(f"iterate{segment % 2}", tuple(y.shape), y.dtype, y.device)
        y = torch.mm(y, total, out=out) if tall else torch.mm(total, y, out=out)
        if not final:
            gram = kept_gram(y)
    return y
