"""coefficients.3: the cubic converges linearly, the tuned quintic superlinearly."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from muonwire.lab.claims.coefficients import NOTE
from muonwire.lab.engine.check import Check, Row
from muonwire.lab.engine.claim import Claim, Setting
from muonwire.lab.engine.show import Pivot, Plot
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.samples import MATRICES
from muonwire.lab.measures.matrices import with_steps
from muonwire.polar import SCHEDULES, Schedule

Values = NDArray[np.float64]
NEAR_ONE, TABLE, REAL = "singular values near 1", "a Gaussian matrix", "real momentum"
STANDARD, TUNED = "taylor_cubic", "tuned"
STEPS = 20
# Errors that are rounding in double precision, and errors at which nothing has converged yet.
ROUNDING, BEGUN = 1e-13, 0.9


def _slope(x: Values, y: Values) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fitted_order(errors: Values) -> float:
    """q of e_{k+1} ≈ C e_k^q, by least squares over the logarithms of consecutive errors.

    Args:
        errors: by iteration; those up to the last of 0.9 or more are left out, and those that are rounding.

    Returns:
        the order; NaN where fewer than three errors are left.
    """
    high = np.flatnonzero(errors >= BEGUN)
    kept = errors[high[-1] + 1 if len(high) else 0 :]
    kept = kept[kept > ROUNDING]
    return _slope(kept[:-1], kept[1:]) if len(kept) >= 3 else math.nan


def _near_one() -> list[Row]:
    # One iteration, the last of each schedule, from 1 ± e: the order in its usual sense.
    distances = np.geomspace(1e-5, 1e-1, 21)
    rows: list[Row] = []
    for name, schedule in SCHEDULES.items():
        last = with_steps(
            Schedule(name=name, coefficients=schedule.coefficients[-1:], source=schedule.source), 1
        )
        ends = np.stack([1 - distances, 1 + distances])
        after = np.maximum(np.abs(1 - last.apply(ends)).max(axis=0), ROUNDING)
        rows.append(
            {
                "data": NEAR_ONE,
                "method": name,
                "order": _slope(distances, after),
                "left": abs(1 - last(1.0)),
                "growth": schedule.slope ** (1 / len(schedule)),
                "growth order": _slope(
                    np.geomspace(1e-8, 1e-5, 9), schedule.apply(np.geomspace(1e-8, 1e-5, 9))
                ),
            }
        )
        rows += [
            {"kind": "near 1", "method": name, "before": float(b), "after": float(a)}
            for b, a in zip(distances, after, strict=True)
        ]
    return rows


def _errors(x: torch.Tensor, schedule: Schedule, steps: int) -> Values:
    """rms of 1 − s² after each iteration, from the singular values, which it maps one by one."""
    values = torch.linalg.svdvals(x.double())
    s = (values / values.norm()).numpy()
    errors = []
    for step in with_steps(schedule, steps).coefficients:
        s = Schedule(name="step", coefficients=(step,), source=schedule.source).apply(s)
        errors.append(float(np.sqrt(np.mean((1 - s * s) ** 2))))
    return np.array(errors)


def _rows(x: torch.Tensor, data: str) -> list[Row]:
    return [
        {"data": data, "by": "iterations", "method": name, "order": fitted_order(_errors(x, schedule, STEPS))}
        for name, schedule in SCHEDULES.items()
    ]


def measure(setting: Setting) -> list[Row]:
    """Fitted orders: of one iteration near 1, and of the error by iteration from 0.9 down."""
    size = setting.pick(512, 48)
    rows = _near_one() + _rows(torch.randn(size, size, generator=setting.generator()), TABLE)
    for source in MATRICES:
        for one in list(captured(setting.input(source), kind="momentum"))[setting.seed % 5 :: 5]:
            rows += _rows(one.matrix, REAL)
    return rows


def _linear(data: str) -> Check:
    return Check(
        name="the order of the cubic is 1 within a tenth",
        setting=f"on {data}",
        column="order",
        select={"data": data, "method": STANDARD},
        at_least=0.9,
        at_most=1.1,
    )


def _superlinear(data: str) -> Check:
    return Check(
        name="the order of the tuned schedule is above 1 by a tenth or more",
        setting=f"on {data}",
        column="order",
        select={"data": data, "method": TUNED},
        at_least=1.1,
    )


CLAIM = Claim(
    id="coefficients.3",
    note=NOTE,
    says="the cubic iteration converges linearly, the tuned quintic superlinearly",
    question="With which order does the error shrink near 1, where the word is defined; how fast do small values "
    "grow; and which order would one read off a table of iterations?",
    expected="The reverse. With p(1) = 1 and p′(1) = 0 the cubic is quadratic near 1, e → 1.5 e². The tuned "
    "schedule’s last step has p(1) = 0.985 and maps the neighbourhood of 1 beside it: order 0, it does not "
    "converge to 1 at all. Near 0 every iteration multiplies: by 1.5, and by 3.5 in the mean. On a matrix with "
    "small singular values the rms error falls by a constant factor while those are still growing, which looks "
    "linear for any schedule: that is what a table of iterations shows.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _linear(TABLE),
        _linear(NEAR_ONE),
        _linear(REAL),
        _superlinear(TABLE),
        _superlinear(NEAR_ONE),
        _superlinear(REAL),
    ),
    meaning={
        "confirmed": "More iterations of the tuned schedule pay more and more, those of the cubic do not.",
        "refuted": "The words are the wrong way round: the cubic converges to 1, with order 2, and the tuned "
        "schedule does not. What makes the tuned one better in five iterations is its growth of small values, and "
        "more iterations of it do not help: past the fifth, go on with Taylor’s coefficients, or take a schedule "
        "made for the number of iterations.",
        "depends": "What looks linear in a table of iterations is small singular values growing by a constant "
        "factor. Near 1 the cubic converges with order 2, while the tuned schedule stops at an error of 0.02. Its "
        "advantage is its growth per iteration, not an order of convergence: past its fifth iteration, go on with "
        "Taylor’s coefficients.",
    },
    tables=(
        Pivot(
            caption="Order q of e → C eᑫ: of the last iteration near 1, with what is left at 1 itself; and growth "
            "per iteration near 0, with its order",
            rows={"method": "Method"},
            values={
                "order": "Order near 1",
                "left": "|1 − p(1)|",
                "growth": "Growth near 0",
                "growth order": "Order near 0",
            },
            select={"data": NEAR_ONE},
        ),
        Pivot(
            caption="The order that the errors of twenty iterations suggest, from 0.9 down",
            rows={"data": "Data", "method": "Method"},
            values={"order": "Fitted order"},
            select={"by": "iterations"},
        ),
    ),
    plots=(
        Plot(
            name="near-one",
            title="One iteration near 1",
            how_to_read="A slope of 2 is quadratic convergence, of 1 linear; a level line does not converge to 1.",
            x=("before", "Distance from 1 before"),
            y=("after", "Distance after"),
            series=("method", "Method"),
            log_x=True,
            log_y=True,
            select={"kind": "near 1"},
        ),
    ),
)
