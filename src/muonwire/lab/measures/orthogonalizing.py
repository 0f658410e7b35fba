"""Ways to orthogonalize a matrix, slow and fast, and matrices of a known condition to try them on."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from muonwire.polar import adaptive, orthonormal_basis, polar

# By the method and the dtype of its products.
Calls = dict[tuple[str, str], Callable[[], Tensor]]

CLASSICAL, MODIFIED, QR, SVD = "Gram–Schmidt, classical", "Gram–Schmidt, modified", "QR, Householder", "SVD"
# What torch.optim.Muon runs: the note's "just a few matrix multiplications".
MUON = "Newton–Schulz, Jordan’s five"
ITERATIONS = {
    MUON: "jordan",
    "Newton–Schulz, Polar Express’s five": "polar_express",
    "Newton–Schulz, five of the cubic": "taylor_cubic",
}
AUTO, ADAPTIVE = "Newton–Schulz, polar’s default", "Newton–Schulz to a polar error of 0.001"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def conditioned(n: int, condition: float, generator: torch.Generator) -> Tensor:
    """n×n, float64: singular values from 1 to 1/condition, evenly spaced on a logarithmic scale, between random rotations."""
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for _ in range(2)
    )
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    made: Tensor = (left * values) @ right.mT
    return made


def slow_calls(x: Tensor) -> Calls:
    """Gram–Schmidt column by column, and the SVD."""
    return {
        (CLASSICAL, "float32"): lambda: orthonormal_basis(x, method="classical_gram_schmidt"),
        (MODIFIED, "float32"): lambda: orthonormal_basis(x, method="modified_gram_schmidt"),
        (SVD, "float32"): lambda: polar(x, method="svd"),
    }


def fast_calls(x: Tensor) -> Calls:
    """A blocked QR, and iterations of matrix products in float32 and bfloat16."""
    made: Calls = {(QR, "float32"): lambda: orthonormal_basis(x)}
    for name, dtype in DTYPES.items():
        for label, schedule in ITERATIONS.items():
            made[label, name] = lambda s=schedule, d=dtype: polar(  # type: ignore[misc]
                x, method="newton_schulz", schedule=s, dtype=d
            )
        made[AUTO, name] = lambda d=dtype: polar(x, dtype=d)  # type: ignore[misc]
    made[ADAPTIVE, "float32"] = lambda: adaptive(x, error=1e-3, dtype=torch.float32)[0]
    return made


def in_double(x: Tensor) -> dict[str, Tensor]:
    """What each method makes of ``x`` with everything in float64."""
    made = {
        CLASSICAL: orthonormal_basis(x, method="classical_gram_schmidt"),
        MODIFIED: orthonormal_basis(x, method="modified_gram_schmidt"),
        QR: orthonormal_basis(x),
        SVD: polar(x, method="svd", dtype=torch.float64),
    }
    for label, schedule in ITERATIONS.items():
        made[label] = polar(x, method="newton_schulz", schedule=schedule, dtype=torch.float64)
    return made
