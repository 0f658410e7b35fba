"""integration.2: compression leaves matrices near rank-deficient."""

import math
from collections.abc import Iterator
from statistics import fmean, median

import torch

from muonwire.lab import Check, Claim, Pivot, Reading, Row, Setting
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import condition, through
from muonwire.lab.measures.spectrum import spectrum_plot, spectrum_rows
from muonwire.polar.quality import numerical_rank

SIZE = 64
DENSITIES = (0.05, 0.1, 0.25)
# The least growth that the note reports, of 37 to 48,000 times.
LEAST = 37.0
WHOLE = "DCT of the 64×64"
# What the note may have compressed: (codec, shape that it is given). A vector's chunks are stretches of it.
DEFINITIONS = {
    WHOLE: ("dct(chunk=64) | topk(density={}) | float32", (SIZE, SIZE)),
    f"{WHOLE}, 1-bit": ("dct(chunk=64) | topk(density={}) | sign(scale=tensor)", (SIZE, SIZE)),
    "DCT of 8×8 chunks": ("dct(chunk=8) | topk(density={}) | float32", (SIZE, SIZE)),
    "DCT of each row": ("dct(chunk=64) | topk(density={}) | float32", (SIZE * SIZE,)),
    "DCT of the flat matrix": ("dct(chunk=4096) | topk(density={}) | float32", (SIZE * SIZE,)),
    "no DCT": ("topk(density={}) | float32", (SIZE, SIZE)),
}


def _before_and_after(x: torch.Tensor, decoded: torch.Tensor) -> dict[str, float]:
    before, after = condition(torch.linalg.svdvals(x)), condition(torch.linalg.svdvals(decoded))
    rank = numerical_rank(decoded, eps=torch.finfo(torch.float32).eps)
    return {
        "before": before,
        "after": after,
        "log growth": math.log10(after / before),
        "grown": 100.0 * (after >= LEAST * before),
        "zero": 100 * (1 - rank / min(x.shape)),
        "any zero": 100.0 * (rank < min(x.shape)),
    }


def _made(setting: Setting) -> Iterator[Row]:
    draws = [gaussian(setting, SIZE, SIZE, stream=i) for i in range(setting.pick(40, 10))]
    for definition, (text, shape) in DEFINITIONS.items():
        for density in DENSITIES:
            found = [
                _before_and_after(x, through(text.format(density), x.view(shape)).view_as(x)) for x in draws
            ]
            yield {
                "data": "Gaussian 64×64",
                "definition": definition,
                "density": density,
                # The condition of a Gaussian matrix has no finite mean; the median of a seed's draws has.
                **{name: median(f[name] for f in found) for name in ("before", "after", "log growth")},
                **{name: fmean(f[name] for f in found) for name in ("zero", "any zero", "grown")},
            }


def _rows(x: torch.Tensor, data: str) -> Iterator[Row]:
    yield from spectrum_rows(x, {"data": data, "density": 1.0})
    for density in DENSITIES:
        decoded = through(DEFINITIONS[WHOLE][0].format(density), x)
        where: Row = {"data": data, "density": density}
        yield from spectrum_rows(decoded, where)
        yield {**where, "definition": WHOLE, **_before_and_after(x, decoded)}


def measure(setting: Setting) -> Iterator[Row]:
    """Condition numbers, numerical ranks and spectra before and after DCT and top-k."""
    yield from _made(setting)
    for row in _rows(gaussian(setting, SIZE, SIZE), "Gaussian 64×64"):
        if "place" in row:
            yield row
    for data, x in real_samples(setting):
        yield from _rows(x, data)


def _grows(data: str, density: float, setting: str, *, answers: bool = True) -> Check:
    return Check(
        name="the condition number grows 37 times or more",
        setting=f"at {100 * density:g} % of {setting}",
        column="log growth",
        select={"data": data, "density": density, "definition": WHOLE},
        at_least=math.log10(LEAST),
        possible=(-8.0, 8.0),
        unit="powers of ten",
        reading=Reading(
            holds="the condition number grows 37 times or more",
            fails="the condition number grows less than 37 times",
            by="{power} times",
            where=f"with {100 * density:g} % of the coefficients of {setting}",
        )
        if answers
        else None,
    )


CLAIM = Claim(
    id="integration.2",
    note=NOTE,
    says="compression makes matrices nearly rank-deficient: the condition number grows 37 to 48,000 times, and "
    "small singular values become zero",
    quoted={
        "condition before": "101.5",
        "after, 5 %": "4,885,288",
        "after, 10 %": "4,526,313",
        "after, 25 %": "3,811",
    },
    question="How do the condition number, the numerical rank and the whole spectrum change when the DCT "
    "coefficients of a matrix are cut to the largest 5, 10 and 25 %?",
    expected="At 5 % some rows or columns of a Gaussian matrix's coefficients are empty: the matrix is singular in exact "
    "arithmetic, and the condition number that is printed is float32's rounding, some millions whatever the matrix. At 10 % that "
    "happens in a few draws, at 25 % in none: the typical condition number does not change at all, and 3,811 is a draw of its "
    "long tail. A real momentum is worse conditioned before, so that there is less to grow.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _grows("Gaussian 64×64", 0.05, "a typical Gaussian matrix"),
        _grows("Gaussian 64×64", 0.1, "a typical Gaussian matrix", answers=False),
        _grows("Gaussian 64×64", 0.25, "a typical Gaussian matrix"),
        _grows("language-model momentum", 0.05, "language-model momentum"),
        _grows("language-model momentum", 0.25, "language-model momentum", answers=False),
    ),
    meaning={
        "confirmed": "What a DCT codec decodes has directions that are rounding only; a polar factor must leave them out.",
        "refuted": "A DCT codec does not make matrices singular; their condition is no reason against "
        "orthogonalizing after decoding.",
        "depends": "Orthogonalize what is decoded by a method that leaves out singular values below its resolution, and add "
        "momentum or feedback, whose sum over rounds has the missing directions.",
    },
    tables=(
        Pivot(
            caption="Condition number in float32, at most 1/ε = 8.4 million (medians over a seed's draws for "
            "Gaussian matrices), the share of singular values that are zero to float32's resolution, and of "
            "matrices that have any, or grew 37 times or more",
            rows={"data": "Data", "definition": "Compressed", "density": "Density"},
            values={
                "before": "Before",
                "after": "After",
                "log growth": "Growth, powers of ten",
                "grown": "Grown 37 times, % of matrices",
                "zero": "Zero, % of values",
                "any zero": "Any zero, % of matrices",
            },
            quoted={
                ("Gaussian 64×64", WHOLE, 0.05): {"before": "101.5", "after": "4,885,288"},
                ("Gaussian 64×64", WHOLE, 0.1): {"before": "101.5", "after": "4,526,313"},
                ("Gaussian 64×64", WHOLE, 0.25): {"before": "101.5", "after": "3,811"},
            },
        ),
    ),
    plots=tuple(
        spectrum_plot(
            f"spectrum-{name}",
            title=f"Singular values of {data} before and after",
            remark="Density 1 is before compression.",
            series=("density", "Density"),
            select={"data": data},
        )
        for name, data in (
            ("gaussian", "Gaussian 64×64"),
            ("training", "training momentum"),
            ("model", "language-model momentum"),
        )
    ),
)
