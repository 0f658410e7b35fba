"""What several claims measure: codecs and polar factors applied to a matrix, and how alike two matrices are."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from muonwire import codec
from muonwire.codec.transform.dct import cosine_basis
from muonwire.polar import Schedule
from muonwire.polar.quality import exact_factor


def through(text: str, x: Tensor) -> Tensor:
    """What a receiver decodes of ``x``, sent through the codec of this text."""
    chosen = codec.parse(text)
    return chosen.decode(chosen.encode(x))


def dct_topk(density: float, quantizer: str = "float32") -> str:
    """The codec that the notes speak of: DCT of 64×64 chunks, and the largest of all coefficients."""
    return f"dct(chunk=64) | topk(density={density}) | {quantizer}"


def polar_factor(x: Tensor) -> Tensor:
    """U Vᵀ, to rounding, in the dtype of ``x``."""
    return exact_factor(x).to(x.dtype)


def with_steps(schedule: Schedule, steps: int) -> Schedule:
    """The first ``steps`` iterations of a schedule, the last one repeated where it has fewer."""
    made = schedule.coefficients + schedule.coefficients[-1:] * max(0, steps - len(schedule))
    return Schedule(name=f"{schedule.name} {steps}", coefficients=made[:steps], source=schedule.source)


def orthogonality_by_step(x: Tensor, *, schedule: Schedule, steps: int, dtype: torch.dtype) -> list[float]:
    """‖G − I‖_F/√r after each iteration of ``with_steps(schedule, steps)`` from X/‖X‖_F, G the smaller Gram matrix.

    G is what the next iteration computes anyway, so ten errors cost one product more than ten iterations; in bfloat16 its
    rounding adds about 0.001.

    Args:
        x: (m, n), not zero.
        schedule: of degree 3 or 5.
        steps: iterations.
        dtype: of the products.
    """
    y = x.to(dtype)
    y = y / y.norm()
    y = y.mT if y.shape[0] > y.shape[1] else y
    errors: list[float] = []
    for a, b, *rest in with_steps(schedule, steps).coefficients:
        gram = y @ y.mT
        errors.append(_defect(gram))
        weight = torch.addmm(gram, gram, gram, beta=b, alpha=rest[0]) if rest else b * gram
        y = torch.addmm(y, weight, y, beta=a)
    return [*errors[1:], _defect(y @ y.mT)]


def cosine(x: Tensor, y: Tensor) -> float:
    """⟨x, y⟩/(‖x‖‖y‖), in [−1, 1]; 0 where one of them is zero."""
    lengths = float(x.norm()) * float(y.norm())
    return float((x * y).sum()) / lengths if lengths else 0.0


def relative_error(y: Tensor, x: Tensor) -> float:
    """‖y − x‖/‖x‖."""
    return float((y - x).norm() / x.norm())


def error_at_best_scale(y: Tensor, x: Tensor) -> float:
    """min over s of ‖s y − x‖/‖x‖, which is √(1 − cos²)."""
    return math.sqrt(max(0.0, 1 - cosine(x, y) ** 2))


def sign_agreement(y: Tensor, x: Tensor) -> float:
    """Share of entries whose signs are the same; a zero agrees with nothing but a zero."""
    return float((y.sign() == x.sign()).float().mean())


def cosine_transform(x: Tensor) -> Tensor:
    """Orthonormal DCT-II of the whole matrix, along both dimensions: D_m x D_nᵀ."""
    left, right = (cosine_basis(size, x.dtype, x.device) for size in x.shape[-2:])
    return left @ x @ right.mT


def energy_of_largest(x: Tensor, share: float) -> float:
    """Σ of the squares of the largest ``share`` of the entries over Σ of all: what a top-k selection keeps."""
    squares = x.flatten().double().square().sort(descending=True).values
    return float(squares[: max(1, round(share * squares.numel()))].sum() / squares.sum())


def energy_of_first(x: Tensor, share: float) -> float:
    """The same of the first entries in row-major order: the lowest frequencies along the rows of a transform."""
    squares = x.flatten().double().square()
    return float(squares[: max(1, round(share * squares.numel()))].sum() / squares.sum())


def energy_of_lowest(x: Tensor, share: float) -> float:
    """The same of the entries of lowest frequency, i/m + j/n for entry (i, j)."""
    m, n = x.shape
    frequency = (torch.arange(m) / m)[:, None] + torch.arange(n) / n
    squares = x.flatten().double().square()[frequency.flatten().argsort(stable=True)]
    return float(squares[: max(1, round(share * squares.numel()))].sum() / squares.sum())


def departure(x: Tensor) -> float:
    """How far the smaller Gram matrix G of x, r by r, is from any multiple of I: √(1 − tr(G)²/(r ‖G‖_F²)), in [0, 1).

    It is min over s of ‖s G − I‖_F/√r: 0 for a multiple of a semi-orthogonal matrix, √(1 − 1/r) for rank 1; 1 for zero.
    """
    wide = x.double()
    gram = wide @ wide.mT if x.shape[-2] <= x.shape[-1] else wide.mT @ wide
    size = float(gram.square().sum()) * gram.shape[-1]
    return math.sqrt(max(0.0, 1 - float(gram.trace()) ** 2 / size)) if size else 1.0


def condition(values: Tensor) -> float:
    """σ_max/σ_min of falling singular values, at most 1/ε of float32: below σ_max ε it can't tell a value from zero."""
    return float(values[0] / values[-1].clamp(min=values[0] * torch.finfo(torch.float32).eps))


def fitted_power(points: Sequence[tuple[float, float]]) -> float:
    """The power p of the least-squares fit y = c xᵖ on logarithmic axes to points (x, y), all above zero."""
    x, y = np.log(np.asarray(points, dtype=np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def _defect(gram: Tensor) -> float:
    wide = gram.to(torch.promote_types(gram.dtype, torch.float32), copy=True)
    wide.diagonal().sub_(1.0)
    return float(wide.norm()) / math.sqrt(gram.shape[0])
