"""Counting matrix products: what a method costs, independent of the machine and of its load."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonwire.polar.gram import symmetric_flops
from muonwire.polar.schedules import Schedule
from muonwire.polar.spectrum import NUM_PROBES

# Position of the left factor among the arguments of each operation that multiplies matrices.
_LEFT_FACTOR = dict.fromkeys(("mm", "bmm", "mv", "dot"), 0) | dict.fromkeys(
    ("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv"), 1
)
# FLOPs of a factorization of r×r, and of the triangular solves with k right-hand sides.
_FACTORIZATIONS: dict[str, Callable[[int, int], int]] = {
    "linalg_cholesky_ex": lambda r, _: r**3 // 3,
    "cholesky_inverse": lambda r, _: r**3 - r**3 // 3,
    "cholesky_solve": lambda r, k: 2 * r * r * k,
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product of a (batch, m, k) by a (batch, k, n) array: 2 · batch · m · k · n FLOPs."""

    batch: int
    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Multiplications plus additions."""
        return 2 * self.batch * self.m * self.k * self.n

    @property
    def is_of_vectors(self) -> bool:
        """Whether it is of one vector, or of the few that the spectrum's estimate starts from with a square matrix."""
        return min(self.m, self.n) == 1 or (self.m <= NUM_PROBES and self.k == self.n > NUM_PROBES)


@dataclass(kw_only=True)
class ProductCount:
    """What ``count_products`` saw: products in order, and the FLOPs of Cholesky factorizations and their solves."""

    products: list[Product] = field(default_factory=list)
    factor_flops: int = 0

    @property
    def flops(self) -> int:
        """FLOPs of all products, products with a vector among them, and of Cholesky factorizations and their solves."""
        return sum(p.flops for p in self.products) + self.factor_flops

    @property
    def matrix_flops(self) -> int:
        """The same without products of vectors (the spectrum's estimate)."""
        return sum(p.flops for p in self.products if not p.is_of_vectors) + self.factor_flops

    def __len__(self) -> int:
        return sum(not p.is_of_vectors for p in self.products)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, count: ProductCount) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = count

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.__name__.split(".")[0]
        if name in _LEFT_FACTOR:
            at = _LEFT_FACTOR[name]
            self.count.products.append(_product(args[at], args[at + 1]))
        elif name in _FACTORIZATIONS:
            shape = args[0].shape
            flops = _FACTORIZATIONS[name](
                args[1].shape[-1] if name == "cholesky_solve" else shape[-2], shape[-1]
            )
            self.count.factor_flops += flops * math.prod(shape[:-2])
        return func(*args, **(kwargs or {}))


def _product(left: Tensor, right: Tensor) -> Product:
    n = right.shape[-1] if right.ndim > 1 else 1
    m = left.shape[-2] if left.ndim > 1 else 1
    return Product(batch=left.shape[0] if left.ndim > 2 else 1, m=m, k=left.shape[-1], n=n)


@contextmanager
def count_products() -> Iterator[ProductCount]:
    """Count every matrix product that PyTorch runs inside, whose code it is.

    FLOPs of a product of m×k by k×n are 2 m k n; of a Cholesky factorization of r×r r³/3, of its inverse 2r³/3, and of solving
    with it for k columns 2 r² k. Other factorizations (QR, SVD, LU) are not counted.

    Yields:
        the count, complete when the context ends.

    >>> import torch
    >>> with count_products() as count:
    ...     _ = torch.ones(3, 4) @ torch.ones(4, 5)
    >>> count.flops, len(count)
    (120, 1)
    """
    count = ProductCount()
    with _Counter(count):
        yield count


def plain_flops(schedule: Schedule, m: int, n: int) -> int:
    """FLOPs of the plain iteration on one m×n matrix: per step X Xᵀ, degree/2 − 1.5 products of r×r, and W X.

    >>> from muonwire.polar.schedules import JORDAN
    >>> plain_flops(JORDAN, 4, 4) // 4**3
    30
    """
    return gram_flops(schedule, m, n, restarts=range(1, len(schedule)))


def gram_flops(
    schedule: Schedule, m: int, n: int, *, restarts: Sequence[int] = (), blocks: bool = False
) -> int:
    """FLOPs of the Gram form on one m×n matrix: X is touched twice a segment, the rest is r×r.

    Args:
        schedule, m, n: the schedule, rows and columns.
        restarts: the steps before which X is brought up to date and its Gram matrix made anew.
        blocks: Gram matrices are made by blocks.

    >>> from muonwire.polar.schedules import JORDAN
    >>> gram_flops(JORDAN, 1, 4), gram_flops(JORDAN, 1, 4, restarts=(2,))
    (50, 60)
    """
    r, s = min(m, n), max(m, n)
    bounds = [0, *restarts, len(schedule)]
    total = 0
    for first, last in pairwise(bounds):
        steps = schedule.coefficients[first:last]
        total += symmetric_flops(r, s, blocks=blocks) + 2 * r * r * s
        # W = c₀ I + c₁ R + … takes as many products as it has coefficients past the first two.
        total += 2 * r**3 * (sum(len(step) - 2 for step in steps) + 3 * (len(steps) - 1))
    return total
