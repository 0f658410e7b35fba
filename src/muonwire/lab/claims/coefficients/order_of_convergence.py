"""coefficients.3: the cubic converges linearly, the tuned quintic superlinearly."""

from collections.abc import Iterator

import numpy as np
import torch

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.coefficients import NOTE, REAL, STANDARD, TUNED
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import fitted_power, with_steps
from muonwire.lab.measures.schedules import (
    ROUNDING,
    Values,
    fitted_order,
    of_steps,
    rms_error,
    unit_values,
)
from muonwire.polar import SCHEDULES, Schedule

NEAR_ONE, TABLE = "singular values near 1", "a Gaussian matrix"
STEPS = 20


def _slope(x: Values, y: Values) -> float:
    return fitted_power(list(zip(x, y, strict=True)))


def _near_one() -> Iterator[Row]:
    # One iteration, the last of each schedule, from 1 ± e: the order in its usual sense.
    distances = np.geomspace(1e-5, 1e-1, 21)
    for name, schedule in SCHEDULES.items():
        last = of_steps(schedule.coefficients[-1])
        ends = np.stack([1 - distances, 1 + distances])
        after = np.maximum(np.abs(1 - last.apply(ends)).max(axis=0), ROUNDING)
        yield {
            "data": NEAR_ONE,
            "method": name,
            "order": _slope(distances, after),
            "left": abs(1 - last(1.0)),
            "growth": schedule.slope ** (1 / len(schedule)),
            "growth order": _slope(np.geomspace(1e-8, 1e-5, 9), schedule.apply(np.geomspace(1e-8, 1e-5, 9))),
        }
        for b, a in zip(distances, after, strict=True):
            yield {"kind": "near 1", "method": name, "before": float(b), "after": float(a)}


def _errors(x: torch.Tensor, schedule: Schedule, steps: int) -> Values:
    """rms of 1 − s² after each iteration, from the singular values, which it maps one by one."""
    s = unit_values(x)
    errors = []
    for step in with_steps(schedule, steps).coefficients:
        s = of_steps(step).apply(s)
        errors.append(rms_error(s))
    return np.array(errors)


def _rows(x: torch.Tensor, data: str) -> Iterator[Row]:
    for name, schedule in SCHEDULES.items():
        order = fitted_order(_errors(x, schedule, STEPS))
        yield {"data": data, "by": "iterations", "method": name, "order": order}


def measure(setting: Setting) -> Iterator[Row]:
    """Fitted orders: of one iteration near 1, and of the error by iteration from 0.9 down."""
    size = setting.pick(512, 48)
    yield from _near_one()
    yield from _rows(gaussian(setting, size, size), TABLE)
    for _, matrix in real_samples(setting):
        yield from _rows(matrix, REAL)


def _linear(data: str, words: str = "") -> Check:
    return Check(
        name="the order of the cubic is 1 within a tenth",
        setting=f"on {data}",
        column="order",
        select={"data": data, "method": STANDARD},
        at_least=0.9,
        at_most=1.1,
        reading=_reading(words, "linearly"),
    )


def _superlinear(data: str, words: str = "") -> Check:
    return Check(
        name="the order of the tuned schedule is above 1 by a tenth or more",
        setting=f"on {data}",
        column="order",
        select={"data": data, "method": TUNED},
        at_least=1.1,
        reading=_reading(words, "superlinearly"),
    )


def _reading(words: str, how: str) -> Reading | None:
    if not words:
        return None
    return Reading(
        holds=f"{words} converges {how}", fails=f"{words} does not converge {how}", by="order {mean}"
    )


CLAIM = Claim(
    id="coefficients.3",
    note=NOTE,
    says="the cubic iteration converges linearly, the tuned quintic superlinearly",
    question="With which order does the error shrink near 1, where the word is defined; how fast do small values "
    "grow; and which order would one read off a table of iterations?",
    expected="It is the other way round. With p(1) = 1 and p′(1) = 0 the cubic is quadratic near 1, e → 1.5 e². The tuned "
    "schedule’s last step has p(1) = 0.985: order 0, it does not converge to 1 at all. Near 0 every iteration multiplies: by "
    "1.5, and by 3.5 in the mean. While small singular values are still growing, the rms error of a matrix falls by a constant "
    "factor, which looks linear for any schedule.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _linear(TABLE, "by its errors on a Gaussian matrix the cubic"),
        _linear(NEAR_ONE, "near 1, where the word is defined, it"),
        _linear(REAL),
        _superlinear(TABLE),
        _superlinear(NEAR_ONE, "near 1 the tuned schedule"),
        _superlinear(REAL, "by its errors on real momentum it"),
    ),
    meaning={
        "confirmed": "More iterations of the tuned schedule pay more and more, those of the cubic do not.",
        "refuted": "More iterations of the tuned schedule do not help: past the fifth, go on with Taylor’s coefficients, or take "
        "a schedule made for the number of iterations.",
        "depends": "Take the tuned schedule for its growth of small values, not for an order of convergence: it stops at an "
        "error of 0.02, so past its fifth iteration go on with Taylor’s coefficients.",
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
