"""integration.1: orthogonalizing before a DCT codec lowers reconstruction quality in 20 of 20 cases."""

from collections.abc import Iterator

import torch

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import (
    cosine,
    dct_topk,
    error_at_best_scale,
    relative_error,
    sign_agreement,
    through,
)
from muonwire.polar.quality import exact_factor

SHAPES = ((64, 64), (128, 128), (64, 256), (256, 64), (256, 256))
DENSITIES = (0.01, 0.05, 0.1, 0.25)
# Whether the larger value is the better one.
MEASURES = {
    "error": (relative_error, False),
    "matched error": (error_at_best_scale, False),
    "signs": (sign_agreement, True),
    "cosine": (cosine, True),
}
FIRST, PLAIN = "orthogonalized first", "as it is"
# Over which cases the note's ranges run, as its figures show: errors from 1 %, signs and cosines from 5 % on.
RANGES = {
    "error": (0.01, "reconstruction error, %"),
    "signs": (0.05, "equal signs, %"),
    "cosine": (0.05, "cosine × 100"),
}


def _rows(x: torch.Tensor, data: str) -> Iterator[Row]:
    u = exact_factor(x).float()
    for density in DENSITIES:
        codec = dct_topk(density)
        sent = {PLAIN: through(codec, x), FIRST: through(codec, u)}
        for target, aim in (("the original", x), ("its polar factor", u)):
            found = {
                (name, order): float(function(y, aim))
                for name, (function, _) in MEASURES.items()
                for order, y in sent.items()
            }
            where: Row = {"data": data, "density": density, "compared with": target}
            for order in sent:
                yield {**where, "sent": order, **{name: 100 * found[name, order] for name in MEASURES}}
            for name, (_, larger_is_better) in MEASURES.items():
                yield {
                    **where,
                    "measure": name,
                    "worse": 100.0 * ((found[name, FIRST] < found[name, PLAIN]) == larger_is_better),
                }
        # Where the polar factor is what is wanted, it may as well be taken after decoding.
        after = exact_factor(sent[PLAIN]).float()
        yield {
            "data": data,
            "density": density,
            "compared with": "its polar factor",
            "sent": "as it is, polar factor after",
            "cosine": 100 * cosine(after, u),
            "matched error": 100 * error_at_best_scale(after, u),
            "signs": 100 * sign_agreement(after, u),
            "error": 100 * relative_error(after, u),
        }


def _ranges(rows: list[Row]) -> Iterator[Row]:
    for measured, (lowest, label) in RANGES.items():
        for sent in (PLAIN, FIRST):
            found = [
                float(row[measured] or 0.0)
                for row in rows
                if row.get("sent") == sent
                and row["compared with"] == "the original"
                and float(row["density"] or 0) >= lowest
            ]
            yield {"of": label, "sent first": sent, "from": min(found), "to": max(found)}


def measure(setting: Setting) -> Iterator[Row]:
    """What a receiver decodes of a matrix and of its polar factor, compared with the one and with the other."""
    made: list[Row] = []
    for stream, (m, n) in enumerate(setting.pick(SHAPES, SHAPES[:2])):
        made += _rows(gaussian(setting, m, n, stream=stream), "Gaussian")
    yield from made
    yield from _ranges(made)
    for data, x in real_samples(setting):
        yield from _rows(x, data)


def _worse(
    data: str, measured: str, target: str, setting: str, name: str, *, reading: Reading | None = None
) -> Check:
    return Check(
        name=name,
        setting=setting,
        column="worse",
        select={"data": data, "measure": measured, "compared with": target},
        at_least=95.0,
        unit="% of the cases",
        reading=reading,
    )


_ERROR = "orthogonalizing first gives the larger error in at least 19 of 20 cases"
_SIGNS = "orthogonalizing first leaves fewer signs equal in at least 19 of 20 cases"
_COSINE = "orthogonalizing first gives the lower cosine in at least 19 of 20 cases"

CLAIM = Claim(
    id="integration.1",
    note=NOTE,
    says="orthogonalizing before DCT and top-k lowers reconstruction quality, sign agreement and cosine, in every "
    "one of 20 cases",
    quoted={"cases helped": "0/20", "error": "53-96% and 93-100%", "signs": "67-82% and 64-81%"},
    question="Compared with the original at the note's unmatched scale, at matched scale, and with the polar "
    "factor, which is the update that Muon applies: what does sending the polar factor cost?",
    expected="As the note compares, orthogonalizing first always loses: a matrix of norm √m is held against one of norm m. At "
    "matched scale it loses what the polar factor itself differs from its matrix, which is wanted. Held against the polar "
    "factor, it wins. The note's ranges are densities 1 to 25 % for the errors and 5 to 25 % for signs and cosine.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _worse("Gaussian", "error", "the original", "as in the note", _ERROR),
        _worse("Gaussian", "signs", "the original", "as in the note", _SIGNS),
        _worse("Gaussian", "matched error", "the original", "at matched scale", _ERROR),
        _worse(
            "language-model momentum",
            "matched error",
            "the original",
            "at matched scale, real momentum",
            _ERROR,
            reading=Reading(
                holds="compared with real momentum, what was orthogonalized first arrives with the larger error",
                fails="compared with real momentum, what was orthogonalized first arrives with no larger error",
                by="in {mean} % of the cases",
                digits=3,
            ),
        ),
        _worse("Gaussian", "cosine", "its polar factor", "compared with the polar factor", _COSINE),
        _worse(
            "language-model momentum",
            "cosine",
            "its polar factor",
            "compared with the polar factor, real momentum",
            _COSINE,
            reading=Reading(
                holds="compared with the polar factor, which Muon applies, it arrives with the lower cosine",
                fails="compared with the polar factor, which Muon applies, it arrives with the higher cosine",
                by="lower in {mean} % of the cases",
                digits=3,
            ),
        ),
    ),
    meaning={
        "confirmed": "Never orthogonalize before a DCT codec, whatever you want to receive.",
        "refuted": "Orthogonalizing before a DCT codec costs nothing.",
        "depends": "To receive the gradient, send the gradient. To receive the update that Muon applies, compare the three ways "
        "in the table with the polar factor; whether being near it is worth loss is for training to say (integration.5).",
    },
    tables=(
        Pivot(
            caption="The note's table: the range over five shapes of Gaussian matrices and densities of 1 (for "
            "signs and cosines 5) to 25 %",
            rows={"of": "Measure", "sent first": "Sent"},
            values={"from": "From", "to": "To"},
            quoted={
                (RANGES[measured][1], sent): {"from": low, "to": high}
                for measured, sent, low, high in (
                    ("error", PLAIN, "53", "96"),
                    ("error", FIRST, "93", "100"),
                    ("signs", PLAIN, "67", "82"),
                    ("signs", FIRST, "64", "81"),
                    ("cosine", PLAIN, "53", "85"),
                    ("cosine", FIRST, "42", "82"),
                )
            },
        ),
        Pivot(
            caption="What is decoded, compared with the original and with its polar factor: relative error as the "
            "note takes it and at matched scale, equal signs, and cosine × 100; the note's ranges run over its "
            "cases from 1 (5 for signs and cosine) to 25 %",
            rows={"data": "Data", "compared with": "Compared with", "sent": "Sent", "density": "Density"},
            values={
                "error": "Error, %",
                "matched error": "At matched scale, %",
                "signs": "Signs, %",
                "cosine": "Cosine × 100",
            },
        ),
        Pivot(
            caption="Share of the cases in which orthogonalizing first is worse, %",
            rows={"data": "Data", "compared with": "Compared with", "measure": "Measure"},
            values={"worse": "Worse"},
        ),
    ),
    plots=(
        Plot(
            name="original",
            title="Cosine to the original: Gaussian matrices",
            how_to_read="The note's comparison. The gap is what a polar factor differs from its matrix.",
            x=("density", "share of the DCT coefficients that are sent"),
            y=("cosine", "cosine × 100"),
            series=("sent", "Sent"),
            log_x=True,
            select={"data": "Gaussian", "compared with": "the original"},
        ),
        Plot(
            name="polar",
            title="Cosine to the polar factor: language-model momentum",
            how_to_read="What Muon wants to apply. The order of the two curves says where to orthogonalize.",
            x=("density", "share of the DCT coefficients that are sent"),
            y=("cosine", "cosine × 100"),
            series=("sent", "Sent"),
            log_x=True,
            select={"data": "language-model momentum", "compared with": "its polar factor"},
        ),
    ),
)
