"""topdown.3: what Gram-Schmidt and Newton-Schulz cost, and how near to the nearest orthogonal matrix they come."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from muonwire.lab.inputs.samples import gaussian
from muonwire.lab.measures.matrices import fitted_power
from muonwire.lab.measures.orthogonalizing import (
    ADAPTIVE,
    AUTO,
    CLASSICAL,
    DTYPES,
    MODIFIED,
    MUON,
    QR,
    SVD,
    Calls,
    conditioned,
    fast_calls,
    in_double,
    slow_calls,
)
from muonwire.lab.measures.timing import median_times
from muonwire.polar import count_products
from muonwire.polar.quality import exact_factor, orthogonality_error, polar_error

SIZES = (128, 256, 512, 1024, 2048)
QUICK_SIZES = (16, 32)
# Exponents are fitted where a call's fixed cost no longer counts.
FITTED_FROM = 512
# Column by column Gram-Schmidt and the SVD take seconds at the largest sizes: they have one turn there, the others three.
SLOW_FROM = 1024
# Within float32, so that the polar factor is well defined: 1/ε is 8e6, and an SVD resolves 1/(n ε).
ILL_SIZE, ILL_CONDITION = 512, 1e4
CONDITIONS = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
LOSS_SIZE = 128
COUNTED_SIZE = 128
GAUSSIAN, ILL, REAL = "Gaussian", "ill-conditioned", "real momentum"
# Jordan's coefficients are meant to end between 0.7 and 1.2 (Jordan, "Muon", 2024), within 0.3 of 1.
NEAR = 0.3


def _timed(calls: Calls, turns: int) -> dict[tuple[str, str], tuple[float, Tensor]]:
    return median_times(calls, turns=turns, keep=lambda result: result)


def _rows(x: Tensor, data: str, *, n: int, largest: bool) -> Iterator[Row]:
    """Times and errors of every method on one matrix."""
    # A spectrum seen for the first time has its schedule solved, which then is kept.
    for (method, _), call in fast_calls(x).items():
        if method in (AUTO, ADAPTIVE):
            call()
    found = _timed(slow_calls(x), 1 if max(x.shape) >= SLOW_FROM else 3) | _timed(fast_calls(x), 3)
    exact = exact_factor(x)
    errors = {key: polar_error(result, x, exact=exact) for key, (_, result) in found.items()}
    base = found[QR, "float32"][0]
    place: dict[str, Value] = {"data": data, "n": n, "largest": largest}
    for (method, dtype), (seconds, result) in found.items():
        yield {
            **place,
            "method": method,
            "dtype": dtype,
            "series": f"{method}, {dtype}",
            "time": 1000 * seconds,
            "relative time": seconds / base,
            "error": orthogonality_error(result),
            "polar error": errors[method, dtype],
        }
    for dtype in DTYPES:
        seconds = found[MUON, dtype][0]
        speeds = {f"speed over {name}": found[name, "float32"][0] / seconds for name in (MODIFIED, QR, SVD)}
        nearness = errors[QR, "float32"] / errors[MUON, dtype]
        yield {**place, "five steps in": dtype, **speeds, "nearer than QR": nearness}


def _exponents(rows: list[Row], first: int) -> Iterator[Row]:
    """The fitted power of n in each method's time."""
    series: dict[tuple[object, object], list[tuple[float, float]]] = {}
    for row in rows:
        n, time = row.get("n"), row.get("time")
        if row["data"] == GAUSSIAN and isinstance(n, int) and isinstance(time, float) and n >= first:
            series.setdefault((row["method"], row["dtype"]), []).append((n, time))
    for (method, dtype), points in series.items():
        yield {"timed": str(method), "dtype": str(dtype), "exponent": fitted_power(points)}


def _counts(x: Tensor) -> Iterator[Row]:
    """Products of the methods that are made of products."""
    for (method, dtype), call in (slow_calls(x) | fast_calls(x)).items():
        if dtype != "float32" or method in (QR, SVD):
            continue
        with count_products() as count:
            call()
        yield {
            "counted": method,
            "products": len(count),
            "vectors": len(count.products) - len(count),
            "flops": count.flops / x.shape[0] ** 3,
        }


def _losses(setting: Setting) -> Iterator[Row]:
    """Loss of orthogonality, and distance to the polar factor, against the condition number, in float64."""
    lost: dict[str, list[tuple[float, float]]] = {}
    for stream, condition in enumerate(CONDITIONS):
        x = conditioned(setting.pick(LOSS_SIZE, 16), condition, setting.generator(stream=50 + stream))
        for method, result in in_double(x).items():
            error = orthogonality_error(result)
            yield {
                "condition": condition,
                "orthogonalized by": method,
                "lost": error,
                "distance": polar_error(result, x),
            }
            lost.setdefault(method, []).append((condition, error))
    for method in (CLASSICAL, MODIFIED, QR):
        yield {"lost by": method, "condition exponent": fitted_power(lost[method])}


def measure(setting: Setting) -> Iterator[Row]:
    """Times and errors against n, on an ill-conditioned matrix and on real momentum, and the loss against the condition."""
    sizes = setting.pick(SIZES, QUICK_SIZES)
    # Threads and libraries start on something small.
    _timed(slow_calls(torch.eye(8)) | fast_calls(torch.eye(8)), 1)
    timed: list[Row] = []
    for stream, n in enumerate(sizes):
        timed += _rows(gaussian(setting, n, n, stream=stream), GAUSSIAN, n=n, largest=n == sizes[-1])
    yield from timed
    yield from _exponents(timed, setting.pick(FITTED_FROM, 0))
    n = setting.pick(ILL_SIZE, 32)
    ill = conditioned(n, ILL_CONDITION, setting.generator(stream=40)).float()
    yield from _rows(ill, ILL, n=n, largest=False)
    found = sorted(
        captured(setting.input(LANGUAGE_MODEL), kind="momentum"), key=lambda one: -one.matrix.numel()
    )
    for one in found[setting.seed : setting.pick(9, 3) : 3]:
        yield from _rows(one.matrix, REAL, n=min(one.matrix.shape), largest=False)
    yield from _counts(gaussian(setting, *[setting.pick(COUNTED_SIZE, 16)] * 2, stream=41))
    yield from _losses(setting)


def _faster(other: str, dtype: str, words: str = "") -> Check:
    return Check(
        name=f"five steps of Newton–Schulz take no longer than {other}",
        setting=f"on the largest Gaussian matrix, products in {dtype}",
        column=f"speed over {other}",
        select={"data": GAUSSIAN, "largest": True, "five steps in": dtype},
        at_least=1.0,
        unit="times as fast",
        reading=Reading(holds=words.format("faster"), fails=words.format("slower")) if words else None,
    )


def _place(data: str) -> tuple[str, dict[str, str | bool]]:
    if data == GAUSSIAN:
        return "on the largest Gaussian matrix", {"data": data, "largest": True}
    return f"on {'an ' if data == ILL else ''}{data}{' matrix' if data == ILL else ''}", {"data": data}


def _nearer(data: str) -> Check:
    setting, select = _place(data)
    return Check(
        name="five steps come nearer to the nearest orthogonal matrix than Gram–Schmidt’s Q",
        setting=setting,
        column="nearer than QR",
        select={**select, "five steps in": "bfloat16"},
        at_least=1.0,
        unit="times as near",
    )


def _near(data: str, words: str = "") -> Check:
    setting, select = _place(data)
    return Check(
        name=f"five steps end within {NEAR} of the nearest orthogonal matrix, as Jordan’s coefficients are meant to",
        setting=setting,
        column="polar error",
        select={**select, "method": MUON, "dtype": "bfloat16"},
        at_most=NEAR,
        possible=(0.0, math.inf),
        reading=Reading(
            holds=words.format(f"within {NEAR} of"), fails=words.format(f"farther than {NEAR} from")
        )
        if words
        else None,
    )


CLAIM = Claim(
    id="topdown.3",
    note=NOTE,
    says="full orthogonalization, by Gram–Schmidt, is expensive; Newton–Schulz is a few matrix products, "
    "fast enough even for a huge matrix, and ends near an orthogonal one",
    quoted={"Newton–Schulz": "just a few matrix multiplications", "result": "near-orthogonal"},
    question="What do Gram–Schmidt (classical, modified, and as Householder’s QR), the Newton–Schulz family and the SVD take "
    "against n, how orthogonal is the result, and how far is it from the nearest orthogonal matrix?",
    expected="All take O(n³). Gram–Schmidt has the fewest operations, 2n³, and a QR with its Q 8n³/3; five steps of degree 5 "
    "have 30n³, but all in matrix products, which run at the processor’s peak and in bfloat16. So Newton–Schulz is faster than "
    "Gram–Schmidt column by column and than the SVD, and against a blocked QR it is a matter of how fast products in bfloat16 "
    "are. Gram–Schmidt’s Q is orthogonal, but not the nearest such matrix: it keeps the first column’s direction, whatever is "
    "spent. Classical Gram–Schmidt loses orthogonality as κ² ε (Giraud et al. 2005), modified as κ ε (Björck 1967), Householder "
    "as ε. Five Newton–Schulz steps carry singular values to about 1 from 1/500 of ‖X‖_F on, and leave smaller ones small.",
    measure=measure,
    inputs=(LANGUAGE_MODEL,),
    repeats=3,
    alone=True,
    checks=(
        _faster(
            MODIFIED,
            "bfloat16",
            f"in bfloat16 and at n = {SIZES[-1]} five Newton–Schulz steps are {{}} than Gram–Schmidt column by column",
        ),
        _faster(QR, "bfloat16"),
        _faster(QR, "float32", "in float32 they are {} than a blocked QR"),
        _faster(SVD, "float32"),
        *(_nearer(data) for data in (GAUSSIAN, ILL, REAL)),
        _near(GAUSSIAN, "on a Gaussian matrix they end {} the polar factor"),
        _near(ILL, "on an ill-conditioned one they end {} it"),
        _near(REAL),
    ),
    meaning={
        "confirmed": "Newton–Schulz is the cheapest way to an orthogonal update, and comes near enough.",
        "refuted": "Newton–Schulz is neither faster than a factorization nor near the polar factor.",
        "depends": "Do not take Gram–Schmidt, whose Q is another matrix than the nearest. Measure which dtype is faster on your "
        "device; singular values below about 1/500 of ‖X‖_F stay small, and where the distance matters, ask for one "
        "(polar.adaptive).",
    },
    tables=(
        Pivot(
            caption="Times and errors. Error: ‖QQᵀ − I‖_F/√n; polar error: ‖Q − UVᵀ‖_F/√n, the distance to "
            "the nearest orthogonal matrix; n: the smaller side",
            rows={"data": "Data", "n": "n", "method": "Method", "dtype": "Products in"},
            values={
                "time": "ms",
                "relative time": "Time over QR’s",
                "error": "Error",
                "polar error": "Polar error",
            },
        ),
        Pivot(
            caption="The power of n by which the time grows, fitted from n = 512 on",
            rows={"timed": "Method", "dtype": "Products in"},
            values={"exponent": "Exponent"},
        ),
        Pivot(
            caption="Products counted: of two matrices, of a matrix with a vector or of two vectors, and FLOPs over n³ (a QR "
            "with its Q has 8/3, an SVD with both factors about 21: Golub and Van Loan, sections 5.2 and 8.6)",
            rows={"counted": "Method"},
            values={"products": "Matrix products", "vectors": "With a vector", "flops": "FLOPs/n³"},
        ),
        Pivot(
            caption="‖QQᵀ − I‖_F/√n and the polar error against the condition number, everything in float64",
            rows={"orthogonalized by": "Method", "condition": "Condition"},
            values={"lost": "Error", "distance": "Polar error"},
        ),
        Pivot(
            caption="The power of the condition number by which orthogonality is lost; the bounds have 2, 1 and 0",
            rows={"lost by": "Method"},
            values={"condition exponent": "Exponent"},
        ),
        Pivot(
            caption="Five steps of Jordan’s beside the others: times as fast, and times as near to the polar factor",
            rows={"data": "Data", "n": "n", "five steps in": "Products in"},
            values={
                f"speed over {MODIFIED}": "As fast as modified Gram–Schmidt",
                f"speed over {QR}": "As fast as QR",
                f"speed over {SVD}": "As fast as SVD",
                "nearer than QR": "As near as QR’s Q",
            },
        ),
    ),
    plots=(
        Plot(
            name="time",
            title="Time against n",
            how_to_read="Straight lines on these axes are powers of n; lower is faster.",
            x=("n", "n"),
            y=("time", "ms"),
            series=("series", "Method"),
            log_x=True,
            log_y=True,
            select={"data": GAUSSIAN},
        ),
        Plot(
            name="loss",
            title="Loss of orthogonality against the condition number",
            how_to_read="Classical Gram–Schmidt climbs fastest; the iterations that stop after five steps "
            "start high, since they are not meant to be exact.",
            x=("condition", "σ_max/σ_min"),
            y=("lost", "‖QQᵀ − I‖_F/√n"),
            series=("orthogonalized by", "Method"),
            log_x=True,
            log_y=True,
        ),
        Plot(
            name="distance",
            title="Distance to the nearest orthogonal matrix",
            how_to_read="Gram–Schmidt and QR lie high at any condition number: their Q is orthogonal, but "
            "another matrix. SVD’s is the matrix that they are measured against.",
            x=("condition", "σ_max/σ_min"),
            y=("distance", "‖Q − UVᵀ‖_F/√n"),
            series=("orthogonalized by", "Method"),
            log_x=True,
            log_y=True,
            left_out=("SVD",),
        ),
    ),
)
