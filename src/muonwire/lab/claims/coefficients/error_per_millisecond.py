"""coefficients.4: the tuned coefficients give ten times the error per millisecond."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.coefficients import NOTE, REAL, STANDARD, STATED, TUNED
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from muonwire.lab.inputs.samples import gaussian
from muonwire.lab.measures.matrices import orthogonality_by_step, with_steps
from muonwire.lab.measures.timing import median_times
from muonwire.polar import SCHEDULES, adaptive, orthonormal_basis, polar
from muonwire.polar.quality import orthogonality_error

# The standard iteration is given at most so many steps to fill the time of five tuned ones.
MOST_STEPS = 30
STEPS = dict.fromkeys(SCHEDULES, (5,)) | {STANDARD: (5, 10, 15), TUNED: (3, 5, 7, 10)}
PAUSED = "tuned, then a pause as long"
# QR's error of rounding would squeeze the others into one line.
UNSHOWN = ("QR", "relaxed_cubic", PAUSED)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One configuration: milliseconds, and the orthogonality error."""

    method: str
    steps: int | None
    time: float
    error: float


def _iterated(x: Tensor, method: str, steps: int) -> Callable[[], Tensor]:
    schedule = with_steps(SCHEDULES[method], steps)
    return lambda: polar(x, method="newton_schulz", schedule=schedule, dtype=torch.bfloat16)


def _configurations(x: Tensor) -> dict[tuple[str, int | None], Callable[[], Tensor]]:
    made: dict[tuple[str, int | None], Callable[[], Tensor]] = {
        (name, count): _iterated(x, name, count) for name, counts in STEPS.items() for count in counts
    }
    made["auto", None] = lambda: polar(x, dtype=torch.bfloat16)
    made["adaptive 0.1", None] = lambda: adaptive(x, error=0.1, dtype=torch.bfloat16)[0]
    made["QR", None] = lambda: orthonormal_basis(x)
    return made


def _timed(x: Tensor, turns: int) -> list[Timed]:
    found = median_times(_configurations(x), turns=turns, keep=orthogonality_error)
    return [
        Timed(method=method, steps=steps, time=1000 * seconds, error=error)
        for (method, steps), (seconds, error) in found.items()
    ]


def _rows(x: Tensor, data: str, turns: int) -> Iterator[Row]:
    timed = _timed(x, turns)
    by = {(t.method, t.steps): t for t in timed}
    tuned, standard = by[TUNED, 5], by[STANDARD, 5]
    # What one more standard iteration takes, without the fixed cost of a call.
    step = (by[STANDARD, 15].time - standard.time) / 10
    fitting = 5 + math.ceil((tuned.time - standard.time) / step) if step > 0 else MOST_STEPS
    steps = min(MOST_STEPS, max(1, fitting))
    equal = orthogonality_by_step(x, schedule=SCHEDULES[STANDARD], steps=steps, dtype=torch.bfloat16)[-1]
    # A pause makes the note's quotient better.
    paused = Timed(method=PAUSED, steps=5, time=2 * tuned.time, error=tuned.error)
    for t in [*timed, paused]:
        yield {
            "data": data,
            "method": t.method,
            "iterations": t.steps,
            "time": t.time,
            "error": t.error,
            "quotient": t.error / t.time,
            "shown": t.method not in UNSHOWN,
            "front": 100.0 * (not any(o.time <= t.time and o.error < t.error for o in timed)),
        }
    yield {
        "data": data,
        "of": "tuned",
        "quotient advantage": (standard.error / standard.time) / (tuned.error / tuned.time),
        "advantage at equal time": equal / tuned.error,
        "iterations in its time": steps,
    }


def measure(setting: Setting) -> Iterator[Row]:
    """Error and time of every configuration in one run, in bfloat16 as the note's code."""
    size = setting.pick(4096, 96)
    x = 0.5 * gaussian(setting, size, size)
    # Threads and libraries start on something small.
    _timed(x[:64, :64], 1)
    yield from _rows(x, STATED, setting.pick(3, 1))
    # The largest matrices, whose time is the products' and not the calls'.
    found = sorted(
        captured(setting.input(LANGUAGE_MODEL), kind="momentum"), key=lambda one: -one.matrix.numel()
    )
    for one in found[setting.seed : 9 : 3]:
        yield from _rows(one.matrix, REAL, setting.pick(7, 1))


def _check(column: str, data: str, measured: str, words: str) -> Check:
    return Check(
        name=f"the tuned schedule’s {measured} is at most a tenth of the standard one’s",
        setting=f"on {data}",
        column=column,
        select={"data": data, "of": "tuned"},
        at_least=9.75,
        unit="times",
        reading=Reading(
            holds=words.format("at most a tenth"),
            fails=words.format("more than a tenth"),
            by="{mean} times less",
            where=f"on {data}" if data == REAL else "at 4096×4096",
        ),
    )


# Error, milliseconds, and error per millisecond.
_NOTE = {
    (STANDARD, 5): ("0.90", "11.9", "0.08"),
    (STANDARD, 10): ("0.40", "23.8", "0.02"),
    (TUNED, 5): ("0.14", "18.7", "0.008"),
    ("QR", None): ("0.002", "32.8", "0.00006"),
}

CLAIM = Claim(
    id="coefficients.4",
    note=NOTE,
    says="the tuned coefficients give ten times better error per millisecond than the standard iteration",
    quoted={
        name: "{} in {} ms, {} err/ms".format(*figures)
        for name, figures in zip(
            ("standard, 5 iterations", "standard, 10 iterations", "tuned, 5 iterations", "QR"),
            _NOTE.values(),
            strict=True,
        )
    },
    question="What do error and time look like side by side, and how much less error does the tuned schedule leave "
    "in the same time?",
    expected="Error divided by time rewards slowness: a method that waits as long as it computed has half the error per "
    "millisecond, so the quotient says nothing. At equal time the standard iteration has seven or eight steps for the five tuned "
    "ones; at 4096×4096 the quarter-circle law then gives 0.87 against 0.24, four times, not ten.",
    measure=measure,
    inputs=(LANGUAGE_MODEL,),
    repeats=3,
    alone=True,
    checks=tuple(
        _check(column, data, measured, words)
        for column, measured, words in (
            (
                "quotient advantage",
                "error per millisecond",
                "the tuned schedule’s error per millisecond is {} of the standard one’s",
            ),
            ("advantage at equal time", "error in equal time", "in equal time its error is {} of it"),
        )
        for data in (STATED, REAL)
    ),
    meaning={
        "confirmed": "The tuned schedule leaves a tenth of the error in the same time.",
        "refuted": "The error is not ten times smaller, in the note’s quotient or at equal time; and the quotient, error over "
        "time, improves when a method wastes time. Read a chart of error against time, and take a configuration on its front.",
        "depends": "Read a chart of error against time for your matrices, and take a configuration on its front: error over time "
        "improves when a method wastes time.",
    },
    tables=(
        Pivot(
            caption="‖QQᵀ − I‖_F/√n, milliseconds, and error per millisecond, beside the note’s; “on the front”: "
            "in how many of the measurements nothing is both as fast and more accurate",
            rows={"data": "Data", "method": "Method", "iterations": "Iterations"},
            values={
                "error": "Error",
                "time": "Time",
                "quotient": "Error per ms",
                "front": "On the front, %",
            },
            quoted={
                (STATED, method, steps): dict(zip(("error", "time", "quotient"), figures, strict=True))
                for (method, steps), figures in _NOTE.items()
            },
        ),
        Pivot(
            caption="The standard iteration’s figure over that of five tuned iterations",
            rows={"data": "Data"},
            values={
                "quotient advantage": "Error per ms",
                "advantage at equal time": "Error at equal time",
                "iterations in its time": "Standard iterations in that time",
            },
            select={"of": "tuned"},
            quoted={(STATED,): {"quotient advantage": "10x"}},
        ),
    ),
    plots=tuple(
        Plot(
            name=name,
            title=f"Error against time, {data}",
            how_to_read="Lower and further left is better; a point with another to its lower left is not worth "
            "taking. Each seed is a point of its own; QR is in the table.",
            x=("time", "Milliseconds"),
            y=("error", "‖QQᵀ − I‖_F/√n"),
            series=("method", "Method"),
            mark="point",
            log_x=True,
            log_y=True,
            select={"data": data, "shown": True},
        )
        for name, data in (("stated", STATED), ("real", REAL))
    ),
)
