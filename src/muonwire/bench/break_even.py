"""Measuring the row of a processor class: which dtype multiplies fastest, and from which sizes each way of working pays."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import takewhile

import torch
from torch import Tensor

from muonwire.polar.auto import polar, polar_list
from muonwire.polar.processor import NEVER, Processor, find_processor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RATE_SIZES = (64, 256, 1024)
# A 16-bit dtype must multiply this much faster than float32 to be worth its rounding.
CLEARLY_FASTER = 1.3
SHORT_EDGES = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512)
# Long edge over short edge.
ASPECTS = {"wide": 4, "square": 1}
# Matrices of one shape in the lists.
NUM_LISTED = 12
# Steps of the measurement, for a progress bar.
NUM_DECISIONS = 8
# The seconds that one choice may take in all; at least three turns are timed.
BUDGET_S = 0.6
FEWEST_TURNS = 5
Progress = Callable[[str], None]
Way = Callable[[Tensor], object]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Speed of products on one device.

    Args:
        gflops: dtype -> edge -> 10⁹ FLOPs per second of a square product.
    """

    gflops: dict[torch.dtype, dict[int, float]]

    @property
    def fastest(self) -> torch.dtype:
        """A 16-bit dtype where clearly faster than float32 at 256, bfloat16 where the two are close."""
        at = {dtype: rates[256] for dtype, rates in self.gflops.items()}
        half, brain, full = at[torch.float16], at[torch.bfloat16], at[torch.float32]
        if max(half, brain) < CLEARLY_FASTER * full:
            return torch.float32
        # float16 has three more bits but five binary orders below 1; bfloat16 needs no care with range.
        return torch.float16 if half > CLEARLY_FASTER * brain else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """What was measured, and the row that follows.

    Args:
        rates: of products.
        row: of the table in ``processor``.
        times: name of a decision -> short edge -> seconds with and without; "choice_wide" and "choice_square": seconds of what
            ``polar`` chooses by the table, and of the fastest way there is.
    """

    rates: Rates
    row: Processor
    times: dict[str, dict[int, tuple[float, float]]]


def measure_rates(device: torch.device, *, sizes: Sequence[int] = RATE_SIZES) -> Rates:
    """Time square products in each dtype.

    Args:
        device: where.
        sizes: edges of the products. Default: 64, 256 and 1024.

    >>> sorted(str(d) for d in measure_rates(torch.device("cpu"), sizes=(16,)).gflops)
    ['torch.bfloat16', 'torch.float16', 'torch.float32']
    """
    rates: dict[torch.dtype, dict[int, float]] = {}
    for dtype in DTYPES:
        rates[dtype] = {}
        for size in sizes:
            a = torch.ones(size, size, dtype=dtype, device=device)
            (seconds,) = take_turns({"": lambda a=a: _waited(torch.mm(a, a))}).values()  # type: ignore[misc]
            rates[dtype][size] = 2 * size**3 / seconds / 1e9
    return Rates(gflops=rates)


def _waited(result: Tensor) -> Tensor:
    if result.device.type != "cpu":
        torch.accelerator.synchronize(result.device)
    return result


def take_turns(calls: Mapping[str, Callable[[], object]], *, budget_s: float = BUDGET_S) -> dict[str, float]:
    """Median seconds of each call; the calls take turns, in another order each time, so that load and caches affect all alike.

    Args:
        calls: by name.
        budget_s: seconds for all turns together, but at least ``FEWEST_TURNS`` turns are taken.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + budget_s
    order, shuffle = list(calls), random.Random(0).shuffle
    while time.perf_counter() < end or len(next(iter(spent.values()))) < FEWEST_TURNS:
        shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name]()
            spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def measure_row(*, progress: Progress | None = None) -> BreakEven:
    """Measure every entry of the table's row for this CPU; about a minute where products are fast.

    Args:
        progress: called with the name of each decision when its turn begins.
    """
    say = progress or (lambda _: None)
    times: dict[str, dict[int, tuple[float, float]]] = {}

    def compare(name: str, aspect: int, new: Way, old: Way) -> dict[int, tuple[float, float]]:
        say(name)
        times[name] = {r: _pair(r, aspect * r, new, old) for r in SHORT_EDGES}
        return times[name]

    cpu = torch.device("cpu")
    say("rates")
    rates = measure_rates(cpu)
    dtype = rates.fastest
    row = replace(
        find_processor(cpu),
        dtype=dtype,
        smallest_half=0.0,
        measured_wide=NEVER,
        measured_square=NEVER,
        stacked_wide=0.0,
    )
    if dtype != torch.float32:
        pairs = compare("smallest_half", 1, _single(row, dtype=dtype), _single(row, dtype=torch.float32))
        first = _first_from(pairs)
        row = replace(row, smallest_half=1e9 if first is None else float(first**3))
    always = replace(row, measured_wide=1, measured_square=1)
    for kind, aspect in ASPECTS.items():
        first = _first_from(compare(f"measured_{kind}", aspect, _single(always), _single(row)))
        row = replace(row, **{f"measured_{kind}": NEVER if first is None else first})  # type: ignore[arg-type]
    stacking = replace(row, stacked_wide=1e18, stacked_square=1e18)
    alone = replace(row, stacked_wide=0.0, stacked_square=0.0)
    for kind, aspect in ASPECTS.items():
        last = _last_before(compare(f"stacked_{kind}", aspect, _listed(alone), _listed(stacking)))
        row = replace(row, **{f"stacked_{kind}": float(aspect * (last or 0) ** 3)})  # type: ignore[arg-type]
    for kind, aspect in ASPECTS.items():
        say(f"choice_{kind}")
        times[f"choice_{kind}"] = {r: _choice(r, aspect * r, dtype) for r in SHORT_EDGES}
    return BreakEven(rates=rates, row=row, times=times)


def _single(row: Processor, *, dtype: torch.dtype | None = None) -> Way:
    return lambda x: polar(x, dtype=dtype, processor=row)


def _listed(row: Processor) -> Way:
    return lambda x: polar_list([x] * NUM_LISTED, processor=row)


def _pair(m: int, n: int, new: Way, old: Way) -> tuple[float, float]:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    times = take_turns({"new": lambda: new(x), "old": lambda: old(x)})
    return times["new"], times["old"]


def _choice(m: int, n: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of ``polar`` by the table that holds now, and of the fastest of the ways that it could have gone."""
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], object]] = {
        f"{method} {of}": partial(polar, x, method=method, dtype=of)
        for of in (dtype, torch.float32)
        for method in ("newton_schulz", "gram")
    }
    ways = {"choice": partial(polar, x), "halley": partial(polar, x, method="halley"), **ways}
    times = take_turns(ways, budget_s=BUDGET_S)
    return times.pop("choice"), min(times.values())


def _first_from(pairs: Mapping[int, tuple[float, float]]) -> int | None:
    """The smallest edge from which on the new way is the faster one at every edge."""
    faster = list(takewhile(lambda r: pairs[r][0] < pairs[r][1], sorted(pairs, reverse=True)))
    return faster[-1] if faster else None


def _last_before(pairs: Mapping[int, tuple[float, float]]) -> int | None:
    """The largest edge up to which the old way is the faster one at every edge."""
    faster = list(takewhile(lambda r: pairs[r][1] < pairs[r][0], sorted(pairs)))
    return faster[-1] if faster else None


def as_text(measured: BreakEven) -> str:
    """The rates, both times of every size behind a decision, and the row beside the one that the table has."""
    lines = ["products, GFLOP/s by edge"]
    for dtype, rates in measured.rates.gflops.items():
        lines.append(
            f"  {str(dtype)[6:].ljust(9)}" + "".join(f"  {n}: {rate:8.1f}" for n, rate in rates.items())
        )
    for name, times in measured.times.items():
        what = "as chosen and by the fastest way" if name.startswith("choice") else "with and without"
        lines += ["", f"{name}: ms {what}, by short edge"]
        lines += [f"  {r:4}  {a * 1e3:8.3f}  {b * 1e3:8.3f}  {b / a:5.2f}x" for r, (a, b) in times.items()]
    table = find_processor(torch.device("cpu"))
    lines += ["", f"{'row':16}  {'measured':>16}  {'in the table':>16}"]
    lines += [
        f"{f.name:16}  {_short(getattr(measured.row, f.name)):>16}  {_short(getattr(table, f.name)):>16}"
        for f in fields(table)
        if f.name not in ("has", "measured")
    ]
    return "\n".join(lines)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).removeprefix("torch.")
