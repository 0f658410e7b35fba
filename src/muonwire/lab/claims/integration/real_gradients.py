"""future.1: real gradients of language models may behave differently from random matrices."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Reading, Row, Setting
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import (
    condition,
    cosine,
    cosine_transform,
    dct_topk,
    energy_of_largest,
    through,
)
from muonwire.lab.measures.spectrum import spectrum_plot, spectrum_rows
from muonwire.polar.quality import exact_factor

SHARE = 0.05
DENSITIES = (0.05, 0.25)
# The kurtosis of Laplace's distribution; Gaussian entries have 3.
HEAVY = 6.0


def _kurtosis(x: Tensor) -> float:
    centered = x.double() - x.double().mean()
    return float(centered.pow(4).mean() / centered.square().mean().square())


def _effective_rank(values: Tensor) -> float:
    """exp of the entropy of σ²/Σσ², over the number of singular values."""
    shares = values.double().square() / values.double().square().sum()
    return float(torch.special.entr(shares).sum().exp()) / len(values)


def _properties(x: Tensor) -> dict[str, float]:
    """What integration.1 to 4 measure, of one matrix."""
    u = exact_factor(x).float()
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    concentration = {
        what: 100 * energy_of_largest(cosine_transform(one), SHARE)
        for what, one in (("it", x), ("factor", u), ("rank one", values[0] * left[:, :1] @ right[:1]))
    }
    found = {
        "kurtosis": _kurtosis(x),
        # Kurtoses of real matrices differ by orders of magnitude; their mean is that of the largest.
        "log kurtosis": math.log10(_kurtosis(x)),
        "effective rank": 100 * _effective_rank(values),
        "condition": math.log10(condition(values)),
        "concentration": concentration["it"],
        "lost by polar": concentration["it"] - concentration["factor"],
        "rank one gain": concentration["rank one"] - concentration["it"],
        "alignment": cosine(u, x),
    }
    for density in DENSITIES:
        codec = dct_topk(density)
        decoded = through(codec, x)
        found[f"cosine {density:g}"] = cosine(decoded, x)
        found[f"cosine lost {density:g}"] = cosine(decoded, x) - cosine(through(codec, u), x)
        found[f"growth {density:g}"] = math.log10(
            condition(torch.linalg.svdvals(decoded)) / condition(values)
        )
    return found


def _pairs(setting: Setting) -> Iterator[tuple[str, Tensor, Tensor]]:
    for stream, (data, x) in enumerate(real_samples(setting, kinds=("gradient", "momentum"))):
        yield data, x, gaussian(setting, *x.shape, stream=stream)


def measure(setting: Setting) -> Iterator[Row]:
    """The properties of real gradients and momenta, and of Gaussian matrices of their shapes."""
    for data, x, noise in _pairs(setting):
        real, made = _properties(x), _properties(noise)
        yield {"data": data, **real}
        yield {"data": "Gaussian of their shapes", **made}
        yield {
            "real": data,
            "rank ratio": real["effective rank"] / made["effective rank"],
            "more concentrated": real["concentration"] - made["concentration"],
            "more lost": real["cosine lost 0.05"] / made["cosine lost 0.05"],
        }
        yield from spectrum_rows(x, {"data": data})
        yield from spectrum_rows(noise, {"data": "Gaussian of their shapes"})


def _checks(data: str, setting: str) -> tuple[Check, ...]:
    select = {"real": data}
    return (
        Check(
            setting=f"tails, {setting}",
            column="log kurtosis",
            select={"data": data},
            at_least=math.log10(HEAVY),
            possible=(0.0, 9.0),
            unit="powers of ten",
            reading=Reading(
                holds=f"{setting} have heavier tails than Laplace’s distribution",
                fails=f"{setting} have no heavier tails than Laplace’s distribution",
                by="kurtosis {power}",
            ),
        ),
        Check(
            setting=f"rank, {setting}",
            column="rank ratio",
            select=select,
            at_most=0.5,
            possible=(0.0, 100.0),
            unit="× a Gaussian matrix's",
            reading=Reading(
                holds="their effective rank is less than half of a Gaussian matrix’s",
                fails="their effective rank is more than half of a Gaussian matrix’s",
                by="{mean} times",
            ),
        ),
        Check(
            setting=f"concentration, {setting}",
            column="more concentrated",
            select=select,
            at_least=2.0,
            possible=(-100.0, 100.0),
            unit="points",
            reading=Reading(
                holds="their largest 5 % of the coefficients have more of the energy",
                fails="their largest 5 % of the coefficients have no more of the energy",
                by="{mean} points more",
            ),
        ),
        Check(
            setting=f"what orthogonalizing costs, {setting}",
            column="more lost",
            select=select,
            at_least=2.0,
            possible=(-1e3, 1e3),
            unit="×",
            reading=Reading(
                holds="orthogonalizing first costs them more cosine",
                fails="orthogonalizing first costs them no more cosine",
                by="{mean} times as much",
            ),
        ),
    )


_VALUES = {
    "kurtosis": "Kurtosis",
    "log kurtosis": "log₁₀",
    "effective rank": "Effective rank, %",
    "condition": "log₁₀ condition",
    "alignment": "cos(X, UVᵀ)",
    "concentration": "Largest 5 %",
    "lost by polar": "less in UVᵀ",
    "rank one gain": "more at rank 1",
    "cosine 0.05": "Cosine, 5 %",
    "cosine lost 0.05": "lost by UVᵀ",
    "growth 0.05": "growth, 5 %",
    "growth 0.25": "growth, 25 %",
}

CLAIM = Claim(
    id="future.1",
    note=NOTE,
    says="real gradients of language models may behave differently from the random matrices of the note, with "
    "heavy tails and a rank structure of their own",
    question="Do tails, rank, DCT concentration, and what orthogonalizing costs before a DCT codec differ between "
    "gradients and momenta of a pretrained language model and Gaussian matrices of the same shapes?",
    expected="Yes: entries of few rows and columns dominate, the effective rank is a small part of the full one, and so top-k "
    "keeps more of a real gradient, and orthogonalizing, which gives every direction the same weight, takes more away.",
    measure=measure,
    inputs=MATRICES,
    checks=_checks("language-model gradient", "gradients of a language model"),
    meaning={
        "confirmed": "Capture your own gradients and measure on those, not on Gaussian matrices.",
        "refuted": "In these respects Gaussian matrices are a fair stand-in for a language model's gradients.",
        "depends": "Gaussian matrices stand in for a language model's gradients in some respects only; the checks "
        "say in which. Capture your own gradients before choosing a codec.",
    },
    tables=(
        Pivot(
            caption="Real matrices and Gaussian ones of the same shapes: kurtosis of the entries (Gaussian 3), effective rank, "
            "condition, cosine to the polar factor; energy of the largest 5 % of the DCT coefficients, what it is less for the "
            "polar factor and more for the matrix cut to rank 1, in points; cosine after DCT top-k, what sending the polar "
            "factor loses of it; growth of the condition, powers of ten",
            rows={"data": "Data"},
            values=_VALUES,
        ),
        Pivot(
            caption="Against a Gaussian matrix of the same shape",
            rows={"real": "Data"},
            values={
                "rank ratio": "Effective rank, ×",
                "more concentrated": "Largest 5 %, points more",
                "more lost": "Cosine lost by UVᵀ, ×",
            },
        ),
    ),
    plots=(
        spectrum_plot(
            "spectra", title="Singular values of real and of Gaussian matrices", series=("data", "Data")
        ),
    ),
)
