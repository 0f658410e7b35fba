"""coefficients.5: the pattern of a, b and c over the iterations."""

import itertools
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.coefficients import NOTE, REAL
from muonwire.lab.inputs.samples import MATRICES, real_samples
from muonwire.lab.measures.schedules import (
    GRID,
    Values,
    fit,
    fixed_points,
    of_steps,
    rms_error,
    unit_values,
)
from muonwire.polar import SCHEDULES, Schedule
from muonwire.polar.schedules import JORDAN, TUNED, cans

LISTED, INTERVALS, FITS, GAUSSIAN = (
    "the schedule it lists",
    "minimax schedules for random intervals",
    "fits to the grid that the listed one was fitted to",
    "a Gaussian matrix",
)
# The listed coefficients are rounded to four decimals, and a converged schedule repeats Taylor's.
TOLERANCE = 1e-3
NUM_INTERVALS = 40


def _pattern(schedule: Schedule) -> dict[str, float]:
    """Whether a falls, b rises and c falls at every step, and the share of changes that do; both in %."""
    steps = np.array(schedule.coefficients)
    kept = np.diff(steps, axis=0) * np.array([1.0, -1.0, 1.0]) <= TOLERANCE
    return {"keep it": 100.0 * bool(kept.all()), "changes": 100 * float(kept.mean())}


def _steps(schedule: Schedule, name: str) -> Iterator[Row]:
    low, high = (schedule.lower or 1e-2), 1.0
    for k, step in enumerate(schedule.coefficients, 1):
        a, b, c = step
        left, right = fixed_points(step)
        yield {
            "schedule": name,
            "iteration": k,
            "a": a,
            "b": b,
            "c": c,
            "smallest before": low,
            "largest before": high,
            "lower fixed point": left,
            "upper fixed point": right,
            "p(1)": a + b + c,
        }
        low, high = of_steps(step).range(low, high)


@lru_cache(maxsize=1)
def _candidates() -> tuple[Schedule, ...]:
    return tuple(cans(lower=float(lower), steps=5) for lower in np.geomspace(1e-4, 0.1, 13))


def _error(s: Values, schedule: Schedule) -> float:
    return rms_error(schedule.apply(s))


def _orders(x: torch.Tensor, data: str) -> Iterator[Row]:
    """The listed steps in other orders, and other schedules, on the singular values of X/‖X‖_F."""
    s = unit_values(x)
    listed = TUNED.coefficients
    error = _error(s, TUNED)
    others = [_error(s, of_steps(*order)) for order in itertools.permutations(listed) if order != listed]
    arrangements = {
        "as listed": TUNED,
        "reversed": of_steps(*listed[::-1]),
        "its first step five times": of_steps(*listed[:1] * 5),
        "its last step five times": of_steps(*listed[-1:] * 5),
        "Jordan’s triple five times": JORDAN,
        "Polar Express": SCHEDULES["polar_express"],
        "minimax for the best lower end": min(_candidates(), key=lambda c: _error(s, c)),
    }
    for name, schedule in arrangements.items():
        yield {"data": data, "arrangement": name, "error": _error(s, schedule)}
    better = sum(other < 0.99 * error for other in others)
    best = arrangements["minimax for the best lower end"]
    yield {"data": data, "better orders": 100 * better / len(others)}
    yield {"of": f"the best minimax schedule for {data}", **_pattern(best)}


def measure(setting: Setting) -> Iterator[Row]:
    """The pattern in listed, derived and fitted schedules; and the error of the steps in any other order."""
    generator = setting.generator()
    yield {"of": LISTED, **_pattern(TUNED)}
    for name in ("polar_express", "cans"):
        yield {"of": f"{name} as published", **_pattern(SCHEDULES[name])}
    for _ in range(NUM_INTERVALS):
        u = torch.rand(2, generator=generator)
        made = cans(lower=float(10 ** (-4 + 3 * u[0])), steps=3 + int(3 * u[1]))
        yield {"of": INTERVALS, **_pattern(made)}
    noise = torch.randn(15, generator=setting.generator(stream=1), dtype=torch.float64).numpy()
    fits = [fit(near, noise=noise, most_evaluations=setting.pick(100, 5)) for near in (JORDAN, TUNED)]
    listed_loss = float(np.sqrt(np.mean((TUNED.apply(GRID) - 1) ** 2)))
    yield {"of": LISTED, "loss": listed_loss}
    for fitted, loss in fits:
        yield {"of": FITS, **_pattern(fitted), "loss": loss}
    for name, schedule in {
        "listed": TUNED,
        "fitted": min(fits, key=lambda fit: fit[1])[0],
        "minimax on [0.01, 1]": cans(lower=1e-2, steps=6),
        "Polar Express": SCHEDULES["polar_express"],
    }.items():
        yield from _steps(schedule, name)
    size = setting.pick(512, 48)
    yield from _orders(torch.randn(size, size, generator=generator), GAUSSIAN)
    for _, matrix in real_samples(setting):
        yield from _orders(matrix, REAL)


def _kept(of: str, holds: str, fails: str, by: str = "{mean} % do") -> Check:
    return Check(
        name="a falls, b rises and c falls at every step",
        setting=f"in {of}",
        column="keep it",
        select={"of": of},
        at_least=99.0,
        unit="% of the schedules",
        reading=Reading(holds=holds, fails=fails, by=by),
    )


def _order(data: str, holds: str, fails: str) -> Check:
    return Check(
        name="no other order of the five steps leaves an error that is smaller by more than 1 %",
        setting=f"on {data}",
        column="better orders",
        select={"data": data},
        at_most=0.0,
        unit="% of the orders",
        reading=Reading(holds=holds, fails=fails),
    )


_NOTE = (
    ("4.08", "-6.89", "2.93"),
    ("3.95", "-6.30", "2.64"),
    ("3.74", "-5.59", "2.30"),
    ("2.88", "-3.14", "1.20"),
    ("2.84", "-3.05", "1.20"),
)

CLAIM = Claim(
    id="coefficients.5",
    note=NOTE,
    says="over the iterations a decreases, b increases (a less aggressive correction) and c decreases, which "
    "matches the natural convergence trajectory",
    quoted={f"a, b, c of iteration {k}": ", ".join(step) for k, step in enumerate(_NOTE, 1)},
    question="Does the pattern hold in the note’s own table and in derived schedules, and does the order of the steps matter?",
    expected="It holds in the table, and follows from the minimax derivation: each step is the best odd quintic on [l, u], and "
    "as l rises to 1 its coefficients go to Taylor’s (1.875, −1.25, 0.375) from the large ones that a small l asks for. The "
    "listed schedule is a fit of p(x) to 1 over a grid; such fits are many and nearly as good, so there the pattern need not be "
    "strict. Coefficients have a meaning only with the scale between the steps: (a/s, b/s, c/s) and then (as, bs³, cs⁵) map "
    "alike.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _kept(
            LISTED,
            "in the note’s own schedule a falls, b rises and c falls",
            "in the note’s own schedule it does not hold that a falls, b rises and c falls",
            by="over 5 steps",
        ),
        _kept(
            INTERVALS,
            "minimax schedules follow this pattern",
            "minimax schedules need not follow this pattern",
        ),
        _kept(FITS, "fitted schedules follow it", "fitted schedules need not follow it"),
        _order(
            GAUSSIAN,
            "on a Gaussian matrix no other order of the note’s steps is better",
            "on a Gaussian matrix other orders of the note’s steps are better",
        ),
        _order(REAL, "none is better on real momentum", "some are better on real momentum"),
    ),
    meaning={
        "confirmed": "Large coefficients belong first, where values are small, and those near Taylor’s last. Keep "
        "the order of a published list, cut it only with its last steps kept, and repeat Taylor’s past its end.",
        "refuted": "The pattern is no guide to making or judging a schedule.",
        "depends": "Judge a schedule by its error on your spectrum, not by the pattern, and do not reorder or repeat its steps: "
        "large coefficients come first, where values are small, those near Taylor’s last.",
    },
    tables=(
        Pivot(
            caption="Coefficients by iteration; the values that go in, from the schedule’s lower end (0.01 where "
            "it has none) to 1; the two points that the step leaves in place, and p(1)",
            rows={"schedule": "Schedule", "iteration": "Iteration"},
            values={
                "a": "a",
                "b": "b",
                "c": "c",
                "smallest before": "Smallest before",
                "largest before": "Largest before",
                "lower fixed point": "Lower fixed point",
                "upper fixed point": "Upper",
                "p(1)": "p(1)",
            },
            quoted={
                ("listed", k): dict(zip(("a", "b", "c"), step, strict=True))
                for k, step in enumerate(_NOTE, 1)
            },
        ),
        Pivot(
            caption="Schedules that follow the pattern at every step, changes that do, and rms of p(x) − 1 over the fit’s grid",
            rows={"of": "Schedules"},
            values={
                "keep it": "Schedules, %",
                "changes": "Changes, %",
                "loss": "rms on the grid",
            },
        ),
        Pivot(
            caption="‖QQᵀ − I‖_F/√n after five steps, by their arrangement",
            rows={"data": "Data", "arrangement": "Steps"},
            values={"error": "Error"},
        ),
    ),
    plots=tuple(
        Plot(
            name=name,
            title=f"Coefficient {name} by iteration",
            how_to_read=f"The claim: {name} {word}. A derived schedule ends at Taylor’s {end}.",
            x=("iteration", "Iteration"),
            y=(name, name),
            series=("schedule", "Schedule"),
        )
        for name, word, end in (("a", "falls", "1.875"), ("b", "rises", "−1.25"), ("c", "falls", "0.375"))
    ),
)
