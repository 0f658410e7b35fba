"""topdown.5: random matrices in high dimension are linearly independent with high probability."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from scipy.stats import kstest

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import fitted_power
from muonwire.lab.measures.random_matrices import (
    all_signs,
    edelman_cdf,
    edelman_quantile,
    full_rank,
    is_singular,
    rounding_norm,
)
from muonwire.polar import SCHEDULES, polar

# (n, draws): the more draws, the better the law is tested; the larger n, the more a draw costs.
GAUSSIAN = ((16, 400), (32, 400), (64, 400), (128, 300), (256, 150), (512, 60))
QUICK_GAUSSIAN = ((4, 40), (8, 40), (16, 40))
SIGNS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
QUICK_SIGNS = (2, 4, 8)
# All ±1 matrices up to this size are gone through: 2^((n−1)²) of them, the first row and column being +1.
MOST_ENUMERATED = 5
LIKELY = 95.0
# The 5 % point of √draws times the Kolmogorov-Smirnov distance.
CRITICAL = 1.36
SCHEDULE = SCHEDULES["polar_express"]


def _gaussian_rows(setting: Setting) -> Iterator[Row]:
    medians: list[tuple[float, float]] = []
    sizes = setting.pick(GAUSSIAN, QUICK_GAUSSIAN)
    for stream, (n, draws) in enumerate(sizes):
        generator = setting.generator(stream=stream)
        x = torch.randn(draws, n, n, generator=generator, dtype=torch.float64)
        values = torch.linalg.svdvals(x)
        rounded = torch.linalg.svdvals(x.bfloat16().double())
        least, least_rounded = values[:, -1].numpy(), rounded[:, -1].numpy()
        floor = rounding_norm(x[0], generator)
        root, largest = math.sqrt(n), n == sizes[-1][0]
        medians.append((n, float(np.median(least))))
        yield {
            "data": "Gaussian",
            "n": n,
            "largest": largest,
            "draws": draws,
            "independent": 100 * float(full_rank(values, size=n, dtype=torch.float64).double().mean()),
            "median": medians[-1][1],
            "median by the law": edelman_quantile(0.5) / root,
            "lowest": float(least.min()),
            "distance": math.sqrt(draws) * float(kstest(root * least, edelman_cdf).statistic),
            "rounded distance": math.sqrt(draws) * float(kstest(root * least_rounded, edelman_cdf).statistic),
            "change": 100 * float(np.median(np.abs(least_rounded - least) / least)),
            "rounded independent": 100
            * float(full_rank(rounded, size=n, dtype=torch.float64).double().mean()),
            "floor": floor,
            "floor over root": floor / root,
            "above floor": 100 * float((least > floor).mean()),
            "above by the law": 100 * (1 - float(edelman_cdf(np.asarray(root * floor)))),
        }
        if largest:
            for t in np.linspace(0.1, 3.0, 30):
                at = round(float(t), 1)
                shares = {
                    "as drawn": float((root * least <= t).mean()),
                    "rounded to bfloat16": float((root * least_rounded <= t).mean()),
                    "Edelman’s law": float(edelman_cdf(np.asarray(t))),
                }
                for name, s in shares.items():
                    yield {"matrices": name, "t": at, "below": 100 * s}
    yield {"fit": "median of σ_min against n", "exponent": fitted_power(medians)}


def _sign_rows(setting: Setting) -> Iterator[Row]:
    sizes, draws = setting.pick((SIGNS, 20_000), (QUICK_SIGNS, 500))
    for n in sizes:
        signs = torch.randint(0, 2, (draws, n, n), generator=setting.generator(stream=100 + n)) * 2 - 1
        row: dict[str, float | int | str | bool | None] = {
            "data": "±1",
            "n": n,
            "largest": n == sizes[-1],
            "independent": 100 * (1 - float(is_singular(signs).double().mean())),
            "singular": 100 * float(is_singular(signs).double().mean()),
            # The expected number of pairs of rows or columns that are equal up to sign.
            "pairs": 100 * 2 * n * (n - 1) / 2**n,
        }
        if n <= MOST_ENUMERATED:
            row["all"] = 100 * float(is_singular(all_signs(n)).double().mean())
        yield row


def _real_rows(setting: Setting) -> Iterator[Row]:
    generator = setting.generator(stream=200)
    for data, matrix in real_samples(setting, kinds=("momentum", "weight")):
        x = matrix.double()
        values = torch.linalg.svdvals(x)
        floor = rounding_norm(x, generator)
        mapped = SCHEDULE.apply(values.numpy() / float(x.norm()))
        yield {
            "real": data,
            "kind": data.split()[-1],
            "independent": 100.0 * bool(full_rank(values, size=max(x.shape), dtype=torch.float32)),
            "resolved": 100 * float((values > floor).double().mean()),
            "all resolved": 100.0 * bool(values[-1] > floor),
            "smallest": float(values[-1] / values[0]),
            "carried": 100 * float((mapped > 0.5).mean()),
        }


def _iterated_rows(setting: Setting) -> Iterator[Row]:
    """What five iterations make of a Gaussian matrix and of one of half its rank, whose other singular values are zero."""
    n = setting.pick(256, 16)
    left, right = (gaussian(setting, n, n // 2, stream=300 + i).double() for i in range(2))
    made = {
        "Gaussian": (gaussian(setting, n, n, stream=302).double(), n),
        "half the rank": (left @ right.mT, n // 2),
    }
    for name, (x, rank) in made.items():
        calls = {
            "five steps, float64": polar(x, method="newton_schulz", schedule=SCHEDULE, dtype=torch.float64),
            "five steps, bfloat16": polar(x, method="newton_schulz", schedule=SCHEDULE, dtype=torch.bfloat16),
            "auto, bfloat16": polar(x, dtype=torch.bfloat16),
        }
        for method, result in calls.items():
            after = torch.linalg.svdvals(result)
            yield {
                "iterated": name,
                "method": method,
                "within": 100 * float((after[:rank] > 0.5).double().mean()),
                "least": float(after[rank - 1]),
                "largest zero": float(after[rank]) if rank < n else None,
            }


def measure(setting: Setting) -> Iterator[Row]:
    """Smallest singular values of Gaussian matrices against the law, singular ±1 matrices, and real momenta and weights."""
    for part in (_gaussian_rows, _sign_rows, _real_rows, _iterated_rows):
        yield from part(setting)


def _likely(
    name: str, setting: str, column: str, select: Mapping[str, Value], reading: Reading | None = None
) -> Check:
    return Check(
        name=f"{LIKELY:g} % of {name}",
        setting=setting,
        column=column,
        select=select,
        at_least=LIKELY,
        possible=(0.0, 100.0),
        unit="%",
        reading=reading,
    )


def _resolved(kind: str, words: str) -> Check:
    return _likely(
        "the matrices have every singular value above the norm of rounding to bfloat16",
        f"on {words}",
        "all resolved",
        {"kind": kind},
        Reading(
            holds=f"all singular values of {words} are above it",
            fails=f"{words} often has singular values below it",
            by="all in {mean} % of the matrices",
        ),
    )


CLAIM = Claim(
    id="topdown.5",
    note=NOTE,
    says="the matrix that is orthogonalized is linearly independent with high probability, because its dimensions are large",
    quoted={"linearly independent": "with high probability becauses the dimensions are large"},
    question="How often are random square matrices singular, how small is their smallest singular value against n, does it "
    "follow Edelman’s law, and can it still be distinguished from zero in bfloat16, for random matrices and for real ones?",
    expected="With a density the probability is 1 at every n: the singular matrices are the zeros of a polynomial, a set of "
    "measure zero. Only for discrete entries a large n is needed: of ±1 matrices two thirds are singular at n = 4, and (1/2 + "
    "o(1))ⁿ for large n. But σ_min falls as 1/√n, by Edelman’s law, while the norm of rounding to bfloat16 grows as 0.0033 √n, "
    "so that from n ≈ 150 on most Gaussian matrices have a singular one within the reach of rounding. Rounding does not reach "
    "it: to first order it moves σ_min by uᵀEv, which does not grow with n. Real momenta are no random matrices: a gradient’s "
    "rank is at most the number of its tokens.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _likely(
            "the matrices have full numerical rank in float64",
            "on Gaussian matrices of the largest size",
            "independent",
            {"data": "Gaussian", "largest": True},
            Reading(
                holds="Gaussian matrices have full rank in float64",
                fails="Gaussian matrices often lack full rank in float64",
            ),
        ),
        _likely(
            "the matrices are not singular",
            "on ±1 matrices of the largest size",
            "independent",
            {"data": "±1", "largest": True},
        ),
        Check(
            name="the smallest singular value falls as n to the power −0.5, within a tenth of that",
            setting="as the theory has it",
            column="exponent",
            select={"fit": "median of σ_min against n"},
            at_least=-0.55,
            at_most=-0.45,
        ),
        Check(
            name="√draws times the Kolmogorov–Smirnov distance to Edelman’s law is below its 5 % point",
            setting="as the theory has it, at the largest size",
            column="distance",
            select={"data": "Gaussian", "largest": True},
            at_most=CRITICAL,
            possible=(0.0, math.inf),
        ),
        _likely(
            "the draws have every singular value above the norm of rounding to bfloat16",
            "in bfloat16, on Gaussian matrices of the largest size",
            "above floor",
            {"data": "Gaussian", "largest": True},
            Reading(
                holds="in bfloat16 the smallest singular value of a large Gaussian matrix is above rounding",
                fails="in bfloat16 the smallest singular value of a large Gaussian matrix is below rounding",
                by="above it in {mean} %",
            ),
        ),
        _resolved("momentum", "real momentum"),
        _resolved("weight", "a real weight"),
    ),
    meaning={
        "confirmed": "Independence can be taken for granted, in bfloat16 and on real matrices too.",
        "refuted": "Do not count on independent rows: neither random nor real matrices have them.",
        "depends": "Nothing to do: an iteration of odd polynomials keeps a zero singular value at zero. What rounding puts in "
        "place of zeros it carries too, as noise of bounded size in the update; polar’s default limits how far.",
    },
    tables=(
        Pivot(
            caption=f"Smallest singular value of Gaussian n×n matrices. Distance: √draws times Kolmogorov–Smirnov’s, whose 5 % "
            f"point is {CRITICAL}. Full rank: σ_min > σ_max n ε of float64",
            rows={"n": "n"},
            values={
                "draws": "Draws",
                "independent": "Full rank, %",
                "median": "Median",
                "median by the law": "Median by the law",
                "lowest": "Lowest drawn",
                "distance": "Distance to the law",
            },
            select={"data": "Gaussian"},
        ),
        Pivot(
            caption="The same matrices rounded to bfloat16: how far the smallest singular value moves (median), the rounded "
            "matrices’ distance to the law, the norm of the rounding, and in how many draws σ_min is above it",
            rows={"n": "n"},
            values={
                "change": "Change, %",
                "rounded independent": "Full rank, %",
                "rounded distance": "Distance to the law",
                "floor": "‖E‖₂",
                "floor over root": "‖E‖₂/√n",
                "above floor": "σ_min > ‖E‖₂, %",
                "above by the law": "By the law, %",
            },
            select={"data": "Gaussian"},
        ),
        Pivot(
            caption="The fitted power of n",
            rows={"fit": "Fit"},
            values={"exponent": "Exponent"},
        ),
        Pivot(
            caption="Singular matrices among those of entries ±1, %, decided exactly: of all, and of those "
            "drawn; beside them the expected number of pairs of rows or columns that are equal up to sign, "
            "which the probability is conjectured to come down to for large n",
            rows={"n": "n"},
            values={"all": "Of all", "singular": "Of those drawn", "pairs": "Pairs, in hundredths"},
            select={"data": "±1"},
        ),
        Pivot(
            caption="Real matrices. Full rank: by float32’s ε. Resolved: singular values above the norm of "
            "rounding to bfloat16. Carried: what five steps of Polar Express bring above a half",
            rows={"real": "Matrices"},
            values={
                "independent": "Full rank, %",
                "all resolved": "All resolved, %",
                "resolved": "Resolved, % of the values",
                "smallest": "σ_min/σ_max",
                "carried": "Carried, % of the values",
            },
        ),
        Pivot(
            caption="Five steps of Polar Express, and polar’s default: which part of the nonzero singular "
            "values ends above a half, the least of them, and the largest of those that were zero",
            rows={"iterated": "Matrix", "method": "Method"},
            values={"within": "Above a half, %", "least": "Least", "largest zero": "Largest that was zero"},
        ),
    ),
    plots=(
        Plot(
            name="law",
            title="Distribution of √n σ_min at the largest n",
            how_to_read="The share of matrices whose smallest singular value, times √n, is at most t. "
            "Rounding changes each value and keeps the distribution.",
            x=("t", "t"),
            y=("below", "% at most t"),
            series=("matrices", "Matrices"),
        ),
        Plot(
            name="against-n",
            title="Smallest singular value against n",
            how_to_read="A straight line of slope −1/2 is 1/√n. Bands are 95 % intervals of the median over the seeds.",
            x=("n", "n"),
            y=("median", "median of σ_min"),
            log_x=True,
            log_y=True,
            select={"data": "Gaussian"},
        ),
        Plot(
            name="signs",
            title="Singular ±1 matrices",
            how_to_read="Of matrices with entries ±1, small ones are often singular and large ones hardly ever. Gaussian matrices "
            "are never singular, at any n.",
            x=("n", "n"),
            y=("singular", "% singular"),
            select={"data": "±1"},
        ),
    ),
)
