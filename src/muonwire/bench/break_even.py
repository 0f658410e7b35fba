"""Measuring the row of a processor class: which dtype multiplies fastest, and from which sizes each way of working pays."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from muonwire.polar.auto import polar, polar_list
from muonwire.polar.processor import Processor, find_processor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RATE_SIZES = (64, 256, 1024)
# A 16-bit dtype must multiply this much faster than float32 to be worth its rounding.
CLEARLY_FASTER = 1.3
SHORT_EDGES = (32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512)
# Long edge over short edge.
WIDE = 4
# Matrices of one shape in the lists.
NUM_LISTED = 12
# Steps of the measurement, for a progress bar.
NUM_DECISIONS = 6
# The seconds that one choice may take in all; at least three turns are timed.
BUDGET_S = 0.6
FEWEST_TURNS = 5
Progress = Callable[[str], None]


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
        times: name of a decision -> size -> seconds with and without.
    """

    rates: Rates
    row: Processor
    times: dict[str, dict[str, tuple[float, float]]]


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
    """Median seconds of each call; the calls take turns, in another order each time, so that load and caches meet all alike.

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
        progress: told the name of each decision when its turn begins.
    """
    say = progress or (lambda _: None)
    cpu = torch.device("cpu")
    found = find_processor(cpu)
    say("rates")
    rates = measure_rates(cpu)
    dtype = rates.fastest
    times: dict[str, dict[str, tuple[float, float]]] = {}
    row = replace(
        found,
        dtype=dtype,
        smallest_half=0.0,
        measured_wide=1 << 30,
        measured_square=1 << 30,
        stacked_wide=0.0,
    )
    volumes = {r: float(r**3) for r in SHORT_EDGES}
    if dtype != torch.float32:
        say("smallest_half")
        half = {
            r: _pair(r, r, lambda x: polar(x, dtype=dtype, processor=row), _in_float32(row))
            for r in SHORT_EDGES
        }
        times["smallest_half"] = _labelled(half)
        row = replace(row, smallest_half=_first_from(half, volumes, never=1e9))
    always = replace(row, measured_wide=1, measured_square=1)
    for kind, aspect in (("wide", WIDE), ("square", 1)):
        say(f"measured_{kind}")
        pairs = {
            r: _pair(
                r,
                aspect * r,
                _by_class(always),
                _by_class(row),
            )
            for r in SHORT_EDGES
        }
        times[f"measured_{kind}"] = _labelled(pairs)
        size = int(_first_from(pairs, {r: float(r) for r in SHORT_EDGES}, never=1 << 30))
        row = replace(row, **{f"measured_{kind}": size})  # type: ignore[arg-type]
    stacking = replace(row, stacked_wide=1e18, stacked_square=1e18)
    single = replace(row, stacked_wide=0.0, stacked_square=0.0)
    for kind, aspect in (("wide", WIDE), ("square", 1)):
        say(f"stacked_{kind}")
        pairs = {
            r: _pair(
                r,
                aspect * r,
                lambda x: polar_list([x] * NUM_LISTED, processor=single),
                lambda x: polar_list([x] * NUM_LISTED, processor=stacking),
            )
            for r in SHORT_EDGES
        }
        times[f"stacked_{kind}"] = _labelled(pairs)
        volume = _last_before(pairs, {r: float(aspect * r**3) for r in SHORT_EDGES})
        row = replace(row, **{f"stacked_{kind}": volume})  # type: ignore[arg-type]
    return BreakEven(rates=rates, row=row, times=times)


def _in_float32(row: Processor) -> Callable[[Tensor], Tensor]:
    return lambda x: polar(x, dtype=torch.float32, processor=row)


def _by_class(row: Processor) -> Callable[[Tensor], Tensor]:
    return lambda x: polar(x, processor=row)


def _pair(
    m: int, n: int, new: Callable[[Tensor], object], old: Callable[[Tensor], object]
) -> tuple[float, float]:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    times = take_turns({"new": lambda: new(x), "old": lambda: old(x)})
    return times["new"], times["old"]


def _labelled(pairs: Mapping[int, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {str(r): pair for r, pair in pairs.items()}


def _first_from(
    pairs: Mapping[int, tuple[float, float]], sizes: Mapping[int, float], *, never: float
) -> float:
    """The smallest size from which on the new way is the faster one at every size."""
    ordered: Sequence[int] = sorted(pairs, reverse=True)
    best = never
    for r in ordered:
        if pairs[r][0] >= pairs[r][1]:
            break
        best = sizes[r]
    return best


def _last_before(pairs: Mapping[int, tuple[float, float]], sizes: Mapping[int, float]) -> float:
    """The largest size up to which the old way is the faster one at every size."""
    best = 0.0
    for r in sorted(pairs):
        if pairs[r][1] >= pairs[r][0]:
            break
        best = sizes[r]
    return best
