"""conflict.1: compressing a polar factor destroys its orthogonality."""

from collections.abc import Iterator

import torch

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import cosine, dct_topk, departure, through
from muonwire.lab.measures.spectrum import spectrum_rows
from muonwire.polar.quality import exact_factor, orthogonality_error

# 0.001 is four coefficients of a 64×64 chunk: the thousandfold compression that the note speaks of.
DENSITIES = (0.001, 0.01, 0.05, 0.25, 1.0)
VALUES = {"exact": "float32", "1-bit": "sign(scale=chunk)"}
SIZE = 64
# The data that the claim's answer is about.
ANSWERED = "language-model momentum"


def _rows(x: torch.Tensor, data: str) -> Iterator[Row]:
    u = exact_factor(x).float()
    unordered = departure(torch.randn(u.shape, generator=torch.Generator().manual_seed(0)))
    for values, quantizer in VALUES.items():
        for density in DENSITIES:
            codec = dct_topk(density, quantizer)
            decoded = through(codec, u)
            where: Row = {"data": data, "values": values, "density": density}
            yield {
                **where,
                "error": orthogonality_error(decoded),
                "departure": departure(decoded),
                "against random": departure(decoded) / unordered,
                "kept": float((decoded * u).sum() / u.square().sum()),
                "alignment": cosine(decoded, u),
                "alignment again": cosine(exact_factor(decoded).float(), u),
                "alignment after": cosine(exact_factor(through(codec, x)).float(), u),
            }
            if values == "exact":
                yield from spectrum_rows(decoded, where, over_largest=False)


def measure(setting: Setting) -> Iterator[Row]:
    """Orthogonality and alignment of decoded polar factors, and of polar factors taken again or only after decoding."""
    yield from _rows(gaussian(setting, SIZE, SIZE), "Gaussian 64×64")
    for data, x in real_samples(setting):
        yield from _rows(x, data)


def _destroyed(data: str, density: float, setting: str) -> Check:
    return Check(
        name=f"at density {density:g} the decoded matrix is as far from orthogonal as a random one, or farther",
        setting=setting,
        column="against random",
        select={"data": data, "density": density, "values": "1-bit"},
        at_least=1.0,
        possible=(0.0, 100.0),
        unit="× a Gaussian matrix's departure",
        reading=Reading(
            holds="a polar factor of real momentum arrives as far from orthogonal as noise, or farther,",
            fails="a polar factor of real momentum arrives nearer to orthogonal than noise",
            by="{mean} times noise’s departure",
            where=f"with {100 * density:g} % of the coefficients",
        )
        if data == ANSWERED
        else None,
    )


CLAIM = Claim(
    id="conflict.1",
    note=NOTE,
    says="orthogonalizing and then compressing by DCT, top-k and 1-bit leaves a matrix that is not orthogonal: "
    "what the polar factor gave is lost",
    quoted={"its compression": "100-1000x", "what it states": "U_reconstructed @ U_reconstructed.T ≠ I"},
    question="How far from orthogonal is a decoded polar factor, how well is it still aligned with the polar "
    "factor, and what does a second polar factor after decoding restore?",
    expected="At a thousandfold compression nothing of the orthogonality is left, at 25 % most of it is. A second polar factor "
    "restores it cheaply; the direction that top-k dropped stays lost.",
    measure=measure,
    inputs=MATRICES,
    checks=tuple(
        _destroyed(data, density, setting)
        for data, setting in (
            ("Gaussian 64×64", "as in the note"),
            ("training momentum", "on real momentum, training"),
            (ANSWERED, "on real momentum, language model"),
        )
        for density in (0.001, 0.25)
    ),
    meaning={
        "confirmed": "A polar factor before a DCT codec is spent on nothing that arrives: orthogonalize after decoding.",
        "refuted": "A polar factor survives a DCT codec well enough to be applied as it is decoded.",
        "depends": "Take a second polar factor after decoding, which makes the step orthogonal again at any density; the "
        "direction that was not sent takes error feedback.",
    },
    tables=(
        Pivot(
            caption="Decoded polar factors Û of U: ‖ÛÛᵀ − I‖_F/√m, the same at the best scale (0 orthogonal, 1 "
            "rank one or zero), its ratio to a Gaussian matrix's, ⟨Û, U⟩/‖U‖², and cosines to U: of Û, of the "
            "polar factor of Û, and of the polar factor of the decoded original",
            rows={"data": "Data", "values": "Values", "density": "Density"},
            values={
                "error": "Error",
                "departure": "At best scale",
                "against random": "× random",
                "kept": "Step kept",
                "alignment": "cos(Û, U)",
                "alignment again": "polar again",
                "alignment after": "polar only after",
            },
        ),
    ),
    plots=(
        Plot(
            name="departure",
            title="Departure of decoded polar factors from orthogonality",
            how_to_read="0 is a multiple of an orthogonal matrix, 1 a matrix of rank one. A square Gaussian matrix "
            "has 0.71. Values as one bit.",
            x=("density", "share of the DCT coefficients that are sent"),
            y=("departure", "departure at the best scale"),
            series=("data", "Data"),
            log_x=True,
            select={"values": "1-bit"},
        ),
        Plot(
            name="spectra",
            title="Singular values of decoded polar factors of training momentum",
            how_to_read="All singular values were 1 before compression. 0 on the left is the largest, 1 on the "
            "right the smallest.",
            x=("place", "place among the singular values"),
            y=("singular", "singular value"),
            series=("density", "Density"),
            select={"data": "training momentum", "values": "exact"},
        ),
    ),
)
