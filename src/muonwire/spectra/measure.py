"""Singular values of weights and measures of them."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from muonwire.spectra.weights import check_finite, doubled, weights_of

TAIL = 0.5
MEASURES = {
    "condition": "condition number σ₁/σᵣ",
    "stable_rank": "stable rank ‖W‖²_F/σ₁², as a share of r",
    "effective_rank": "effective rank exp(entropy of σ/Σσ), as a share of r",
    "entropy": "spectral entropy of σ²/Σσ², as a share of log r",
    "tail": "tail exponent of the eigenvalues σ²",
}


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Measures of the singular values σ₁ ≥ … ≥ σᵣ of one matrix (m, n), r = min(m, n).

    Args:
        condition: σ₁/σᵣ; infinite where σᵣ is zero.
        rank: how many σ exceed max(m, n) · eps · σ₁, eps of the dtype that the weight is stored in; smaller ones are rounding.
        stable_rank: ‖W‖²_F / (σ₁² r), in (0, 1].
        effective_rank: exp(−Σ p log p) / r with p = σ / Σσ, in (0, 1] (Roy and Vetterli 2007).
        entropy: −Σ q log q / log r with q = σ² / Σσ², in [0, 1]; 1 for r = 1.
        tail: Hill's estimate of α in P(λ > x) ∝ x^{1−α} over the upper half of λ = σ²: 1 + k / Σ log(λᵢ/λ_{k+1}) (Hill 1975;
            the exponent of Martin and Mahoney 2021, whose lower cut is searched instead). Small: a heavy tail.
        largest, smallest: σ₁ and σᵣ.
        frobenius: ‖W‖_F.
    """

    condition: float
    rank: int
    stable_rank: float
    effective_rank: float
    entropy: float
    tail: float
    largest: float
    smallest: float
    frobenius: float


def spectrum(values: Tensor, *, shape: tuple[int, int], eps: float) -> Spectrum:
    """The measures of singular values.

    Args:
        values: (r,), in any order.
        shape: (m, n) of the matrix.
        eps: of the dtype that it is stored in.

    >>> spectrum(torch.tensor([2.0, 2.0]), shape=(2, 2), eps=1e-7).condition
    1.0
    """
    s = values.double().sort(descending=True).values
    r, largest, smallest = len(s), float(s[0]), float(s[-1])
    if largest == 0.0:
        return Spectrum(
            condition=math.inf,
            rank=0,
            stable_rank=0.0,
            effective_rank=0.0,
            entropy=0.0,
            tail=math.inf,
            largest=0.0,
            smallest=0.0,
            frobenius=0.0,
        )
    energy = s.square()
    k = max(int(TAIL * r), 1)
    logs = (energy[:k] / energy[min(k, r - 1)]).log().sum()
    return Spectrum(
        condition=largest / smallest if smallest else math.inf,
        rank=int((s > max(shape) * eps * largest).sum()),
        stable_rank=float(energy.sum()) / (largest**2 * r),
        effective_rank=math.exp(_entropy(s / s.sum())) / r,
        entropy=_entropy(energy / energy.sum()) / math.log(r) if r > 1 else 1.0,
        tail=1 + k / float(logs) if float(logs) > 0 else math.inf,
        largest=largest,
        smallest=smallest,
        frobenius=math.sqrt(float(energy.sum())),
    )


def _entropy(p: Tensor) -> float:
    return -float(torch.special.xlogy(p, p).sum())


def singular_values(name: str, matrix: Tensor) -> Tensor:
    """(r,), falling, in float64 on the CPU.

    Raises:
        UsageError: the matrix holds NaN or infinity.
    """
    check_finite(name, matrix)
    # A tall matrix has the singular values of the R of its QR decomposition, at a fraction of the time.
    x = doubled(matrix)
    tall = x if x.shape[0] >= x.shape[1] else x.mT
    if tall.shape[0] > 2 * tall.shape[1]:
        tall = torch.linalg.qr(tall, mode="r").R
    values: Tensor = torch.linalg.svdvals(tall)
    return values.cpu()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The spectra of one model.

    Args:
        label: of the model.
        matrices: one row a matrix: model, name, layer, kind, group, rows, columns, and the fields of Spectrum.
        values: one row a singular value: model, name, layer, kind, group, index (from 0), place (index / r), value.
    """

    label: str
    matrices: pl.DataFrame
    values: pl.DataFrame


def measure(model: nn.Module, *, label: str, step: Any = None) -> Measured:
    """The spectra of all weight matrices of a model.

    Args:
        model: any module.
        label: its name in the tables.
        step: called with the name of each matrix before it is measured, for a progress bar.

    Raises:
        UsageError: a weight holds NaN or infinity, or there are no matrices.
    """
    matrices, values = [], []
    for weight in weights_of(model):
        for name, matrix in weight.matrices():
            if step is not None:
                step(name)
            s = singular_values(name, matrix)
            rows, columns = matrix.shape
            described = {part: getattr(weight, part) for part in ("layer", "kind", "group")}
            about = {"model": label, "name": name, **described}
            measured = spectrum(s, shape=(rows, columns), eps=torch.finfo(matrix.dtype).eps)
            matrices.append({**about, "rows": rows, "columns": columns, **asdict(measured)})
            r = len(s)
            row = {**about, "index": range(r), "place": [i / r for i in range(r)], "value": s.tolist()}
            values.append(pl.DataFrame(row, schema_overrides={"layer": pl.Int64, "index": pl.Int64}))
    return Measured(
        label=label,
        matrices=pl.DataFrame(matrices, schema_overrides={"layer": pl.Int64}),
        values=pl.concat(values),
    )


def num_matrices(model: nn.Module) -> int:
    """How many matrices ``measure`` measures."""
    return sum(sum(1 for _ in w.matrices()) for w in weights_of(model))


def write_measured(measured: list[Measured], folder: Path) -> list[Path]:
    """Write ``matrices.parquet`` and ``singular_values.parquet`` of all models; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "matrices.parquet", folder / "singular_values.parquet"]
    pl.concat([m.matrices for m in measured]).write_parquet(paths[0])
    pl.concat([m.values for m in measured]).write_parquet(paths[1])
    return paths
