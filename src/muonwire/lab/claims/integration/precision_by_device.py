"""integration.6: precision by device: float32 on CPU, float16 on Volta, bfloat16 from Ampere on."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs.samples import gaussian
from muonwire.polar import Schedule, find_processor, polar
from muonwire.polar.quality import exact_factor, polar_error
from muonwire.polar.schedules import polar_express

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The first is about what torch.optim.Muon's own five iterations leave of a Gaussian matrix.
ERRORS = (0.15, 0.02, 0.001)
SHAPES = ((256, 1024), (384, 384))
STEPS = range(2, 11)
LOWERS = (3e-2, 3e-3, 3e-4, 3e-5)
# So many iterations more than float32's may a narrower dtype have to come within the same error.
MORE_STEPS = 2
# A dtype that has taken this long in turns takes no more of them, once it has had the fewest.
BUDGET_S = 2.0
FEWEST_TURNS = 2
VOLTA, AMPERE = (7, 0), (8, 0)
# Limits a processor with more to AVX2; a process must have it from its start.
TO_AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
FAST, SLOW = "has fast 16-bit products", "has none"


def rule(device: torch.device) -> str:
    """The dtype that the note's rule names for a device."""
    if device.type != "cuda":
        return "float32"
    capability = torch.cuda.get_device_capability(device)
    return "bfloat16" if capability >= AMPERE else "float16" if capability >= VOLTA else "float32"


def _run(x: Tensor, schedule: Schedule, dtype: torch.dtype) -> Tensor:
    return polar(x, method="newton_schulz", schedule=schedule, dtype=dtype)


def _best_schedules(x: Tensor, exact: Tensor) -> list[tuple[Schedule, float]]:
    """For each number of iterations the schedule of least error in float32, and that error."""
    best = []
    for steps in STEPS:
        tried = [polar_express(lower=lower, steps=steps) for lower in LOWERS]
        errors = [polar_error(_run(x, s, torch.float32), x, exact=exact) for s in tried]
        best.append((tried[errors.index(min(errors))], min(errors)))
    return best


def _calls(
    x: Tensor, exact: Tensor, best: list[tuple[Schedule, float]], error: float
) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """By dtype: the fewest iterations within ``error``, and the call; dtypes that do not come within it are left out."""
    fewest = next((i for i, (_, reached) in enumerate(best) if reached <= error), len(best))
    calls: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    for name, dtype in DTYPES.items():
        for schedule, _ in best[fewest : fewest + 1 + MORE_STEPS]:
            if polar_error(_run(x, schedule, dtype), x, exact=exact) <= error:
                calls[name] = (
                    len(schedule.coefficients),
                    lambda s=schedule, d=dtype: _run(x, s, d),  # type: ignore[misc]
                )
                break
    return calls


def _seconds(calls: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Times of all calls, taking turns, so that a change of load meets all alike; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(1 + rounds):
        for name, call in calls.items():
            if len(times[name]) >= FEWEST_TURNS and sum(times[name]) > BUDGET_S:
                continue
            start = time.perf_counter()
            if call().device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def measure(setting: Setting) -> Iterator[Row]:
    """Times of the polar factor in each dtype at equal polar error, on this processor and, where it has more, limited to AVX2."""
    yield from measure_here(setting, limited="")
    if find_processor(torch.device("cpu")).name.startswith(("avx512", "amx")):
        code = (
            "import json, torch; from pathlib import Path; from muonwire.lab.engine.claim import Setting\n"
            "from muonwire.lab.claims.integration.precision_by_device import measure_here\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"
            f"setting = Setting(seed={setting.seed}, quick={setting.quick}, folder=Path('.'))\n"
            "print(json.dumps(list(measure_here(setting, limited=', a processor limited to it'))))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **TO_AVX2},
            capture_output=True,
            text=True,
            check=True,
        )
        yield from json.loads(done.stdout.splitlines()[-1])


def measure_here(
    setting: Setting, *, limited: str, shapes: Sequence[tuple[int, int]] | None = None
) -> Iterator[Row]:
    """Times of the polar factor in each dtype at equal polar error, as ratios within one run.

    Args:
        setting: of the claim.
        limited: what to say of the processor class besides its name.
        shapes: of the matrices. Default: the claim's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() and not limited else "cpu")
    processor = find_processor(device)
    about: dict[str, float | int | str | None] = {
        "processor": processor.name + limited,
        "products": SLOW if processor.dtype == torch.float32 else FAST,
    }
    for stream, (m, n) in enumerate(shapes or setting.pick(SHAPES, ((64, 128),))):
        x = gaussian(setting, m, n, stream=stream).to(device)
        exact = exact_factor(x)
        best = _best_schedules(x, exact)
        for error in ERRORS:
            calls = _calls(x, exact, best, error)
            times = _seconds({name: call for name, (_, call) in calls.items()}, setting.pick(7, 2))
            median = {name: statistics.median(found) for name, found in times.items()}
            ruled = times.get(rule(device))
            for name in DTYPES:
                row = {
                    **about,
                    "shape": f"{m}×{n}",
                    "error": error,
                    "dtype": name,
                    "case": f"{name}, {processor.name}",
                }
                if name in calls:
                    ratios = [a / b for a, b in zip(times["float32"], times[name], strict=False)]
                    row |= {
                        "steps": calls[name][0],
                        "ms": 1e3 * median[name],
                        "speed": statistics.median(ratios),
                    }
                yield row
            if ruled:
                fastest = times[min(median, key=lambda name: median[name])]
                slower = statistics.median(a / b for a, b in zip(ruled, fastest, strict=False))
                yield {**about, "error": error, "rule": rule(device), "slower": slower}


def _fastest(error: float, products: str) -> Check:
    products_text = "with fast 16-bit products" if products == FAST else "without fast 16-bit products"
    where = f"{products_text} at polar error {error:g}"
    return Check(
        name=f"at polar error {error:g} the rule's dtype takes at most a tenth longer than the fastest",
        setting=f"a processor that {products}",
        column="slower",
        select={"error": error, "products": products},
        at_most=1.1,
        possible=(0.0, 1e6),
        unit="× the fastest's time",
        reading=Reading(
            holds="the note’s dtype is the fastest",
            fails="the note’s dtype is not the fastest",
            by="{mean} times the best time",
            where=where,
        )
        if error == ERRORS[0] or (error == ERRORS[-1] and products == FAST)
        else None,
    )


CLAIM = Claim(
    id="integration.6",
    note=NOTE,
    says="the precision follows from the device: float32 on CPUs, float16 on V100, bfloat16 on A100 and later",
    quoted={"rule": "FP32 on CPU, FP16 on V100, BF16 on A100+"},
    question="At equal polar error, each dtype with as many iterations as it needs: which one is the fastest on "
    "this device, and which one on the same processor limited to AVX2?",
    expected="On CPUs with bfloat16 products bfloat16, several times, as far as its errors allow, which is to a "
    "few percent; below that float32, as bfloat16 does not get there. On AVX2 float32 at every error, tens of times: there the "
    "rule is right. float16 is the slowest where it has no products of its own.",
    measure=measure,
    alone=True,
    repeats=3,
    version=2,
    checks=tuple(_fastest(error, products) for products in (FAST, SLOW) for error in ERRORS),
    meaning={
        "confirmed": "On this device the rule gives the fastest dtype; on another one measure again.",
        "refuted": "On this device the rule costs time at every error; leave the dtype to polar, which follows what the "
        "processor can do.",
        "depends": "Leave the dtype to polar, which follows the processor's class, and takes float32 where a smaller error is "
        "asked for than narrower dtypes give.",
    },
    tables=(
        Pivot(
            caption="Polar factors of Gaussian matrices within a polar error: iterations, time, and how many times "
            "faster than float32 in the same run; a dash where the dtype does not come within the error",
            rows={"processor": "Processor", "shape": "Shape", "error": "Error", "dtype": "Products in"},
            values={"steps": "Iterations", "ms": "ms", "speed": "× float32"},
        ),
        Pivot(
            caption="Time of the dtype that the rule names for this device over the fastest one's",
            rows={"processor": "Processor", "rule": "Rule", "error": "Error"},
            values={"slower": "Times"},
        ),
    ),
    plots=(
        Plot(
            name="speed",
            title="Speed at equal polar error, against float32 in the same run",
            how_to_read="Above 1 is faster than float32. A missing bar: the dtype does not come within the error.",
            x=("error", "polar error allowed"),
            y=("speed", "times faster than float32"),
            series=("case", "Products in"),
            mark="bar",
        ),
    ),
)
