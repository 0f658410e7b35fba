"""approach.E: low rank by singular value decomposition instead of DCT."""

import math
import time
from collections.abc import Iterator

import torch

from muonwire import codec
from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training
from muonwire.lab.inputs.samples import samples_of
from muonwire.lab.inputs.text_training import TEXT_TRAINING
from muonwire.lab.measures.matrices import cosine, polar_factor, through
from muonwire.polar import polar
from muonwire.recipes.compressed import CODEC

RECIPES = {
    "approach E, rank 4": "approach_e",
    "approach E, rank 13": "approach_e(rank=13)",
    "approach B": "approach_b",
    **training.REFERENCES,
}
SVD = "lowrank(rank=4, method=svd) | bfloat16"
TIMED = {
    "truncated SVD": SVD,
    "the same by power iteration": "lowrank(rank=4, method=power) | bfloat16",
    "DCT, top-k, 1-bit": CODEC,
}


def dct_of_equal_bytes(shape: torch.Size) -> str:
    """DCT and top-k with bfloat16 values and the largest k that sends no more than the factors of rank 4."""
    budget = codec.parse(SVD).estimate_bytes(shape)
    texts = [f"dct(chunk=64) | topk(k={k}) | bfloat16" for k in range(1, 4096)]
    low, high = 0, len(texts)
    while high - low > 1:
        middle = (low + high) // 2
        fits = codec.parse(texts[middle]).estimate_bytes(shape) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return texts[low]


def _structure(setting: Setting) -> Iterator[Row]:
    for x in samples_of(setting, TEXT_TRAINING, kind="momentum", num_parts=len(training.SEEDS)):
        wanted = polar_factor(x)
        texts = {"truncated SVD, rank 4": SVD, "DCT, top-k": dct_of_equal_bytes(x.shape)}
        found = {name: cosine(polar(through(text, x)).float(), wanted) for name, text in texts.items()}
        for name, value in found.items():
            yield {"sent": name, "cosine": value}
        lead = found["truncated SVD, rank 4"] - found["DCT, top-k"]
        yield {"pair": "SVD beside DCT", "lead": lead}


def _seconds(text: str, x: torch.Tensor) -> float:
    chosen, taken = codec.parse(text), []
    for _ in range(3):
        start_s = time.perf_counter()
        chosen.encode(x)
        taken.append(time.perf_counter() - start_s)
    return min(taken)


def _times(setting: Setting) -> Iterator[Row]:
    ratio = math.nan
    for n in setting.pick((128, 256, 512, 1024), (64, 128)):
        x = torch.randn(n, n, generator=setting.generator(stream=n))
        taken = {name: _seconds(text, x) for name, text in TIMED.items()}
        for name, s in taken.items():
            yield {"codec": name, "n": n, "encode_ms": 1000 * s}
        ratio = taken["truncated SVD"] / taken["DCT, top-k, 1-bit"]
        yield {"n": n, "ratio": ratio}
    yield {"n": "largest", "ratio": ratio}


def measure(setting: Setting) -> list[Row]:
    """What low rank and DCT keep of real momentum's polar factor, their time, and approach E in training."""
    runs = training.Results.of(setting)
    return [
        *_structure(setting),
        *_times(setting),
        *runs.rows(RECIPES),
        training.instead_of_distro("E", runs, "approach_e"),
        training.gain("E instead of B", of=runs["approach_e"], over=runs["approach_b"]),
    ]


CLAIM = Claim(
    id="approach.E",
    note=NOTE,
    says="the factors of a truncated singular value decomposition preserve the orthogonal structure that DCT "
    "destroys, but are expensive to find: O(n³) against O(n log n)",
    quoted={"work of the SVD": "O(n³)", "work of the DCT": "O(n log n)"},
    question="At equal bytes, is the polar factor of what was decoded nearer to the momentum’s own after a truncated SVD than "
    "after DCT and top-k; how much longer does it take; and what does the approach come to in training?",
    expected="Not nearer: rank 4 gives a polar factor of four directions at most, whose cosine with the whole is "
    "√(4/n), while top-k leaves some of every direction. Slower from a few hundred rows on. In training better "
    "than DisTrO alone, for its feedback brings the other directions in turn, and at many times its bits.",
    measure=measure,
    inputs=(TEXT_TRAINING, training.TRAINING),
    alone=True,
    checks=(
        Check(
            setting="on real momentum",
            column="lead",
            select={"pair": "SVD beside DCT"},
            at_least=0.0,
            possible=(-2.0, 2.0),
            unit="of cosine",
            reading=Reading(
                holds="at equal bytes an SVD leaves a polar factor nearer to the momentum’s than DCT does",
                fails="at equal bytes an SVD leaves a polar factor farther from the momentum’s than DCT does",
                by="{size} of cosine",
            ),
        ),
        Check(
            name="the SVD takes longer than DCT, top-k and signs",
            setting="by time at the largest width",
            column="ratio",
            select={"n": "largest"},
            at_least=1.0,
            unit="times",
            reading=Reading(
                holds="it takes longer", fails="it takes no longer", by="{mean} times DCT’s time"
            ),
        ),
        training.below_distro_check("E"),
    ),
    meaning={
        "confirmed": "Factors of low rank keep more of the polar factor at equal bytes and train better than "
        "DisTrO; find them by power iteration, which costs two products instead of an SVD.",
        "refuted": "A truncated SVD keeps less of the polar factor than DCT at equal bytes and gains nothing in training.",
        "depends": "Look at what each of the three costs you: the cosine at equal bytes, the time at your widths, and the loss "
        "at the bits in the table. Power iteration (powersgd_muon, dion) finds such factors without an SVD.",
    },
    tables=(
        Pivot(
            caption="Cosine of the decoded matrix’s polar factor with that of the momentum, at equal bytes",
            rows={"sent": "Sent as"},
            values={"cosine": "Cosine"},
        ),
        Pivot(
            caption="Time to encode an n×n matrix, ms",
            rows={"codec": "Codec", "n": "n"},
            values={"encode_ms": "Time"},
        ),
        training.OUTCOMES,
        training.GAINS,
    ),
    plots=(
        training.CURVES,
        Plot(
            name="time",
            title="Time to encode an n×n matrix",
            how_to_read="Lower is faster; the slope is the order of growth.",
            x=("n", "n"),
            y=("encode_ms", "ms"),
            series=("codec", "Codec"),
            log_x=True,
            log_y=True,
        ),
    ),
)
