"""variance.1: orthogonalizing reduces the variance of gradients."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.coefficients import NOTE, STANDARD, TUNED
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.samples import MATRICES, dealt, gaussian
from muonwire.lab.measures.matrices import polar_factor
from muonwire.polar import polar

RANDOM, REAL = "independent Gaussian matrices, as the source’s", "real gradients of eight replicas"
RAW, DIVIDED, EXACT = "gradient", "divided by its norm", "exact polar factor"
# 1 − 1/10 is the note's direction variance of 0.900; independent directions have it whatever the draws.
NUM_DRAWS = 10


def _scheduled(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: polar(x, method="newton_schulz", schedule=name, dtype=torch.bfloat16)


def _divided(x: Tensor) -> Tensor:
    # To the norm that a polar factor has, so that the two differ in direction only.
    scaled: Tensor = x * (math.sqrt(min(x.shape)) / x.norm())
    return scaled


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    RAW: lambda x: x,
    DIVIDED: _divided,
    STANDARD: _scheduled(STANDARD),
    TUNED: _scheduled(TUNED),
    "jordan": _scheduled("jordan"),
    EXACT: polar_factor,
}


def _measures(draws: Sequence[Tensor]) -> dict[str, float]:
    x = torch.stack(list(draws)).flatten(1).double()
    norms = x.norm(dim=1)
    directions = x / norms[:, None]
    variance = x.var(dim=0)
    return {
        "element variance": float(variance.mean()),
        # What the note's "norm CV" is; see ``expected``.
        "norm variance": float(norms.var() / norms.mean()),
        "norm deviation": float(norms.std() / norms.mean()),
        "direction variance": 1 - float(directions.mean(dim=0).square().sum()),
        "relative variance": float(variance.sum() / x.mean(dim=0).square().sum()),
    }


def _rows(draws: Sequence[Tensor], data: str) -> Iterator[Row]:
    measured = {name: _measures([make(x) for x in draws]) for name, make in METHODS.items()}
    before, divided = measured[RAW], measured[DIVIDED]
    for name, now in measured.items():
        row: dict[str, float | str] = {"data": data, "method": name, **now}
        if name != RAW:
            row |= {
                "fall": before["element variance"] / now["element variance"],
                "norm fall": _over(before["norm variance"], now["norm variance"]),
                "deviation fall": _over(before["norm deviation"], now["norm deviation"]),
                "relative fall": before["relative variance"] / now["relative variance"],
                "direction change": abs(now["direction variance"] - before["direction variance"]),
                "over division": now["element variance"] / divided["element variance"],
            }
        yield row


def _over(before: float, now: float) -> float:
    # A norm that is the same but for rounding has no variance to compare with; such rows do not take part.
    return before / now if now > 1e-12 else math.inf


def measure(setting: Setting) -> Iterator[Row]:
    """The note's three variances, and two that no change of scale alters, before and after."""
    size = setting.pick(512, 48)
    draws = [0.5 * gaussian(setting, size, size, stream=k) for k in range(NUM_DRAWS)]
    yield from _rows(draws, RANDOM)
    for source in MATRICES:
        found = captured(setting.input(source), kind="gradient", replicas=True)
        groups = [
            [one.matrix for one in group]
            for _, group in groupby(found, key=lambda one: (one.point, one.layer))
        ]
        for group in dealt(setting, groups):
            yield from _rows(group, REAL)


def _check(
    name: str,
    data: str,
    column: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    words: str = "",
    where: str = "",
) -> Check:
    """``words`` have "falls" in place of {} where the check holds, and "does not fall" where it fails."""
    return Check(
        name=name,
        setting=f"on {data}",
        column=column,
        select={"data": data, "method": TUNED},
        at_least=at_least,
        at_most=at_most,
        possible=(0.0, 1.0 if column == "direction change" else math.inf),
        unit="times" if at_most is None else "",
        reading=Reading(
            holds=words.format("falls"),
            fails=words.format("does not fall"),
            by="before over after {mean}",
            digits=3,
            where=where,
        )
        if words
        else None,
    )


_ELEMENT = "the variance of an element falls at least 100 times (the note: 125)"
_NORM = "the norm’s variance over its mean falls at least 36 times (the note: 55, by its rounded figures 36 or more)"
# The ratio of two variances of ten norms each strays widely; the figure itself does so less.
_AFTER = "the norm’s variance over its mean is 0.00001 afterwards, rounded to five decimals"
_RELATIVE = "the variance relative to the squared mean at least halves"
_OF_ELEMENT, _OF_RELATIVE = "an element’s variance {} 100-fold", "relative to the mean it {} by half"
_DIRECTION = "the direction variance stays the same to three digits"

CLAIM = Claim(
    id="variance.1",
    note=NOTE,
    says="orthogonalizing, by any method, reduces the variance of an element 125 times and the norm’s CV 55 times "
    "and leaves the direction variance as it was",
    quoted={
        "element variance, before and after": "0.250, 0.002",
        "norm CV": "0.00055, 0.00001",
        "direction variance": "0.900, 0.900",
    },
    question="On which input and by which definitions do the figures come out, what is left of them where a change "
    "of scale cannot alter the measure, and what holds for the gradients of real replicas?",
    expected="The figures are those of ten independent Gaussian 512×512 matrices with element variance 1/4: 1/512 is 0.002 and 1 "
    "− 1/10 is 0.900. The norm’s coefficient of variation would be 1/(512√2) = 0.0014; its variance over its mean is 0.125/256 = "
    "0.0005, the note’s figure. Dividing each matrix by its norm does the same, so it is a change of scale. Real replicas’ "
    "gradients have elements far smaller than a polar factor’s, so their variance rises; and as small singular values, the "
    "noisiest, are raised to the others’ level, the variance relative to the mean rises too.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _check(
            _ELEMENT,
            RANDOM,
            "fall",
            at_least=100.0,
            words=_OF_ELEMENT,
            where="on independent Gaussian matrices",
        ),
        _check(
            _ELEMENT, REAL, "fall", at_least=100.0, words=_OF_ELEMENT, where="on gradients of real replicas"
        ),
        _check(_AFTER, RANDOM, "norm variance", at_most=0.000015),
        _check(_NORM, REAL, "norm fall", at_least=36.0),
        _check(_RELATIVE, RANDOM, "relative fall", at_least=2.0, words=_OF_RELATIVE, where="on the former"),
        _check(_RELATIVE, REAL, "relative fall", at_least=2.0, words=_OF_RELATIVE, where="on the latter"),
        _check(_DIRECTION, RANDOM, "direction change", at_most=0.0005),
        _check(_DIRECTION, REAL, "direction change", at_most=0.0005),
    ),
    meaning={
        "confirmed": "Orthogonalizing each replica’s gradient averages away noise: fewer replicas or smaller batches do.",
        "refuted": "Orthogonalizing does not reduce the variance of gradients.",
        "depends": "Average the replicas first, or the momentum over time, and orthogonalize the mean: orthogonalizing each "
        "replica’s own gradient changes the scale and does not reduce noise against the mean.",
    },
    tables=(
        Pivot(
            caption="Before and after, beside the note’s figures (its “after” is of any method). Norm CV as the "
            "note has it is variance over mean",
            rows={"data": "Data", "method": "Method"},
            values={
                "element variance": "Element variance",
                "norm variance": "Norm, variance/mean",
                "norm deviation": "Norm, deviation/mean",
                "direction variance": "Direction variance",
                "relative variance": "Variance over squared mean",
            },
            quoted={
                (RANDOM, RAW): {
                    "element variance": "0.250",
                    "norm variance": "0.00055",
                    "direction variance": "0.900",
                },
                (RANDOM, TUNED): {
                    "element variance": "0.002",
                    "norm variance": "0.00001",
                    "direction variance": "0.900",
                },
            },
        ),
        Pivot(
            caption="By how much each falls; “over division”: the element variance over what dividing by the norm alone leaves",
            rows={"data": "Data", "method": "Method"},
            values={
                "fall": "Element variance",
                "norm fall": "Norm, variance/mean",
                "deviation fall": "Norm, deviation/mean",
                "relative fall": "Variance over squared mean",
                "direction change": "Change of direction variance",
                "over division": "Over division",
            },
            quoted={(RANDOM, TUNED): {"fall": "125x", "norm fall": "55x"}},
        ),
    ),
    plots=(
        Plot(
            name="relative",
            title="Variance of eight replicas relative to their mean",
            how_to_read="Where a bar is higher than the gradient’s, the replicas’ results agree less with each other than "
            "their gradients did.",
            x=("method", "Method"),
            y=("relative variance", "Σ variance/‖mean‖²"),
            mark="bar",
            select={"data": REAL},
        ),
    ),
)
