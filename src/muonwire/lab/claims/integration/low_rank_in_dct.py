"""integration.4: low rank does not make the DCT more compressible."""

from collections.abc import Iterator, Mapping
from statistics import fmean, stdev

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import cosine_transform, energy_of_first, energy_of_largest
from muonwire.polar.quality import exact_factor

SIZE = 64
RANKS = (1, 4, 16, 64)
ALL = "all"
SHARE = 0.1
# A matrix of low "effective" rank: what is left of full rank is this part of the size of an entry.
NOISES = {"exactly of the rank": 0.0, "plus 1 % noise": 0.01}
PLAIN, POLAR = "as it is", "polar factor"


def _shares(x: Tensor) -> dict[str, float]:
    c = cosine_transform(x)
    return {"largest": 100 * energy_of_largest(c, SHARE), "first": 100 * energy_of_first(c, SHARE)}


def _both(x: Tensor) -> dict[str, dict[str, float]]:
    return {PLAIN: _shares(x), POLAR: _shares(exact_factor(x).float())}


def _made(setting: Setting, noise: float, data: str) -> Iterator[Row]:
    found: dict[int, list[dict[str, dict[str, float]]]] = {}
    for draw in range(setting.pick(30, 6)):
        left, right, rest = (gaussian(setting, SIZE, SIZE, stream=3 * draw + i) for i in range(3))
        for rank in RANKS:
            x = left[:, :rank] @ right[:, :rank].mT / rank**0.5 + noise * rest
            found.setdefault(rank, []).append(_both(x))
    for rank, draws in found.items():
        for matrix in (PLAIN, POLAR):
            first = [d[matrix]["first"] for d in draws]
            yield {
                "data": data,
                "rank": rank,
                "matrix": matrix,
                "largest": fmean(d[matrix]["largest"] for d in draws),
                "first": fmean(first),
                "spread": stdev(first),
            }
    gain = fmean(d[PLAIN]["largest"] for d in found[RANKS[0]]) - fmean(
        d[PLAIN]["largest"] for d in found[RANKS[-1]]
    )
    yield {"data": data, "gain": gain}


def _real(x: Tensor, data: str) -> Iterator[Row]:
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    truncated: dict[int | str, Tensor] = {r: (left[:, :r] * values[:r]) @ right[:r] for r in RANKS}
    found = {rank: _both(one) for rank, one in (truncated | {ALL: x}).items()}
    for rank, both in found.items():
        for matrix, shares in both.items():
            yield {"data": data, "rank": rank, "matrix": matrix, **shares}
    yield {"data": data, "gain": _gain(found)}


def _gain(found: Mapping[int | str, dict[str, dict[str, float]]]) -> float:
    return found[1][PLAIN]["largest"] - found[ALL][PLAIN]["largest"]


def measure(setting: Setting) -> Iterator[Row]:
    """Energy shares of the largest and of the first tenth of the DCT coefficients, by rank.

    Made matrices are products of Gaussian factors; real ones are truncated to their largest singular values.
    """
    for what, noise in NOISES.items():
        yield from _made(setting, noise, f"Gaussian factors, {what}")
    for data, x in real_samples(setting):
        yield from _real(x, data)


def _no_gain(data: str, setting: str, matrices: str = "") -> Check:
    return Check(
        name="the largest tenth of the coefficients has no more of the energy at rank 1 than at full rank",
        setting=setting,
        column="gain",
        select={"data": data},
        at_most=0.0,
        possible=(-100.0, 100.0),
        unit="points",
        reading=Reading(
            holds="a matrix of rank 1 is no more concentrated than one of full rank",
            fails="a matrix of rank 1 is more concentrated than one of full rank",
            by="{mean} points of the energy in the largest tenth",
            where=f"among {matrices}",
        )
        if matrices
        else None,
    )


def _quotes(data: str) -> dict[tuple[Value, ...], dict[str, str]]:
    plain, orthogonal = ("5.1", "10.8", "11.1", "11.7"), ("11.0", "10.7", "10.6", "10.9")
    return {
        (data, rank, matrix): {"first": figure}
        for matrix, figures in ((PLAIN, plain), (POLAR, orthogonal))
        for rank, figure in zip(RANKS, figures, strict=True)
    }


NOISY = "Gaussian factors, plus 1 % noise"
CLAIM = Claim(
    id="integration.4",
    note=NOTE,
    says="low-rank structure does not make the DCT more compressible; a matrix of rank 1 is less concentrated than "
    "one of full rank",
    quoted={
        "top 10 %, rank 1": "5.1 % and 11.0 % orthogonalized",
        "top 10 %, rank 64": "11.7 % and 10.9 % orthogonalized",
    },
    question="Which share of the energy lies in the largest tenth of the DCT coefficients, by rank, over many "
    "draws? And in the first tenth in row-major order, which the note's figures look like?",
    expected="More at rank 1: its coefficients are products of two Gaussian vectors', whose tails are heavier than a Gaussian's. "
    "The note's figures can't be the largest tenth's, of which even white noise has 44 %; they are of the first tenth, 10 % on "
    "average for any rank, and a single draw of rank 1 is 5 points off. Orthogonalizing a matrix of low effective rank gives the "
    "noise below it the weight of the signal, which is why 5.1 became 11.0.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _no_gain(
            "Gaussian factors, exactly of the rank",
            "as in the note, exact rank",
            "products of Gaussian factors",
        ),
        _no_gain(NOISY, "as in the note, effective rank"),
        _no_gain("training momentum", "on training momentum, truncated"),
        _no_gain(
            "language-model momentum", "on language-model momentum, truncated", "language-model momentum"
        ),
    ),
    meaning={
        "confirmed": "Low rank is of no use to a DCT codec: use a low-rank codec for it.",
        "refuted": "Low rank makes top-k's share larger, on made and on real matrices: the note measured the first coefficients "
        "and not the largest. Orthogonalizing undoes it, since it gives every direction the same weight.",
        "depends": "Whether low rank helps a DCT codec is a matter of the data; see the table.",
    },
    tables=(
        Pivot(
            caption="Share of the DCT energy, %, in a tenth of the coefficients, and the standard deviation of the "
            "first tenth's over draws",
            rows={"data": "Data", "rank": "Rank", "matrix": "Matrix"},
            values={
                "largest": "In the largest tenth",
                "first": "In the first tenth",
                "spread": "± of one draw",
            },
            quoted=_quotes(NOISY),
        ),
    ),
    plots=(
        Plot(
            name="rank",
            title="Energy in the largest tenth of the DCT coefficients, by rank",
            how_to_read="Higher is more compressible by top-k. White noise has 44 %.",
            x=("rank", "rank"),
            y=("largest", "% of the energy"),
            series=("data", "Data"),
            mark="bar",
            select={"matrix": PLAIN},
        ),
    ),
)
