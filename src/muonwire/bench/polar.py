"""Timing polar factors against torch.optim.Muon's own function and its five steps in float32: interleaved runs, medians, errors."""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.optim import _muon

from muonwire.bench.peers import Factor, peers
from muonwire.errors import UsageError
from muonwire.polar.auto import adaptive, polar, polar_list
from muonwire.polar.exact import EXACT
from muonwire.polar.orthonormal import BASES, orthonormal_basis
from muonwire.polar.products import count_products
from muonwire.polar.quality import exact_factor, orthogonality_error, polar_error
from muonwire.polar.schedules import JORDAN, SCHEDULES

REFERENCE = "torch.optim.Muon"
# The honest peer where bfloat16 products are slow: what anybody would write there.
PLAIN = "five steps in float32"
TRIPLE = (3.4445, -4.7750, 2.0315)
WIDE = ((512, 2048), (576, 1536), (768, 3072), (1024, 4096), (2048, 8192))
SQUARE = ((512, 512), (1024, 1024), (2048, 2048))
LIST_SHAPES = ((576, 576),) * 30 + ((576, 1536),) * 60
# Errors that ``adaptive`` is asked for.
ERRORS = (0.1, 0.02, 1e-3)
# The exact methods and Gram-Schmidt take minutes past this min(m, n).
LARGEST_EXACT = 600
# Calls that take less are timed several in a row, as ``timeit`` does.
SHORTEST_TURN_S = 2e-3
# Past this time in turns on one input a method takes no more of them, once it has had the fewest.
BUDGET_S = 3.0
FEWEST_TURNS = 3


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One method on one input.

    Args:
        input: name of the input.
        shape: (m, n), or (0, 0) for a list of mixed shapes.
        method: name of the method.
        seconds: median time.
        ratio: median over the rounds of the reference's time over this method's in the same round.
        plain_ratio: the same with the time of ``plain_steps``.
        polar_error: ‖P − U Vᵀ‖_F/‖U Vᵀ‖_F against a float64 SVD; NaN for a list.
        orthogonality_error: ‖G − I‖_F/√r; NaN for a list.
        gflop: 10⁹ FLOPs of matrix products, counted.
    """

    input: str
    shape: tuple[int, int]
    method: str
    seconds: float
    ratio: float
    plain_ratio: float
    polar_error: float
    orthogonality_error: float
    gflop: float

    def speed_over(self, baseline: str) -> float:
        """How many times as fast as one of ``BASELINES``."""
        return self.ratio if baseline == REFERENCE else self.plain_ratio


def torch_muon(x: Tensor) -> Tensor:
    """torch.optim.Muon's own function with its defaults: five steps of Jordan's triple in bfloat16.

    >>> torch_muon(torch.eye(2)).dtype
    torch.bfloat16
    """
    return _muon._zeropower_via_newtonschulz(x, TRIPLE, len(JORDAN), 1e-7)


def plain_steps(x: Tensor) -> Tensor:
    """The five steps of ``torch_muon`` with every product in float32.

    >>> plain_steps(torch.eye(2)).dtype
    torch.float32
    """
    a, b, c = TRIPLE
    tall = x.shape[0] > x.shape[1]
    y = (x.mT if tall else x).float()
    y = y / y.norm().clamp_min(1e-7)
    for _ in range(len(JORDAN)):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


# What everything is compared with, by name.
BASELINES: dict[str, Factor] = {REFERENCE: torch_muon, PLAIN: plain_steps}


def methods() -> dict[str, Factor]:
    """Every method by name, the baselines first, then the peers that are installed.

    >>> list(methods())[:3]
    ['torch.optim.Muon', 'five steps in float32', 'auto']
    """
    table: dict[str, Factor] = BASELINES | {"auto": polar}
    table |= {f"adaptive {error:g}": _adaptive(error) for error in ERRORS}
    table |= {f"newton_schulz {name}": _factor("newton_schulz", name) for name in SCHEDULES}
    table |= {f"gram {name}": _factor("gram", name) for name in ("tuned", "polar_express")}
    table |= {name: _factor(name) for name in EXACT}
    table |= {name: partial(orthonormal_basis, method=name) for name in BASES}
    return table | peers()


def inputs(shapes: Sequence[tuple[int, int]], *, seed: int = 0) -> dict[str, Tensor]:
    """Gaussian matrices of the shapes, and for the first shape the other spectra.

    Args:
        shapes: (m, n) each.
        seed: of the generator. Default: 0.

    Returns:
        name -> float32 matrix: Gaussian, σ ∝ 1/k, log-normal row scales, rank-deficient.

    >>> [name for name in inputs([(8, 16)])]
    ['gaussian 8x16', '1/k 8x16', 'log-normal rows 8x16', 'half rank 8x16']
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {f"gaussian {m}x{n}": draw(m, n) for m, n in shapes}
    m, n = shapes[0]
    r = min(m, n)
    left, right = torch.linalg.qr(draw(m, r))[0], torch.linalg.qr(draw(n, r))[0]
    made[f"1/k {m}x{n}"] = (left / torch.arange(1, r + 1)) @ right.mT
    made[f"log-normal rows {m}x{n}"] = draw(m, n) * draw(m, 1).exp()
    made[f"half rank {m}x{n}"] = draw(m, max(r // 2, 1)) @ draw(max(r // 2, 1), n)
    return made


def measure(
    matrices: Mapping[str, Tensor],
    chosen: Mapping[str, Factor],
    *,
    rounds: int = 9,
    warmup: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Measurement]:
    """Time every method on every input; they take turns, in another order each time, so that load and caches affect all alike.

    A method that has taken ``BUDGET_S`` seconds on one input sits out after its third turn there.

    Args:
        matrices: name -> (m, n).
        chosen: name -> method; the baselines are added where they are missing.
        rounds: timed turns. Default: 9.
        warmup: turns before. Default: 1.
        progress: called with the name of each input, before it.

    Raises:
        UsageError: no round.

    >>> rows = measure({"eye": torch.eye(8)}, {"auto": polar}, rounds=1)
    >>> [row.method for row in rows]
    ['torch.optim.Muon', 'five steps in float32', 'auto']
    """
    if rounds < 1:
        raise UsageError(f"bench polar: rounds is {rounds!r}; at least one is needed")
    rows: list[Measurement] = []
    for name, x in matrices.items():
        progress(name)
        shape = (x.shape[0], x.shape[1])
        used = BASELINES | {k: f for k, f in chosen.items() if _affordable(k, shape)}
        times = _take_turns({k: partial(f, x) for k, f in used.items()}, rounds=rounds, warmup=warmup)
        exact = exact_factor(x)
        for method in times:
            with count_products() as count:
                result = used[method](x)
            errors = polar_error(result, x, exact=exact), orthogonality_error(result)
            rows.append(_row(name, shape, method, times, errors=errors, flops=count.flops))
    return rows


def measure_list(
    shapes: Sequence[tuple[int, int]] = LIST_SHAPES,
    *,
    rounds: int = 3,
    seed: int = 0,
    name: str | None = None,
) -> list[Measurement]:
    """A list of matrices: one call of ``polar_list`` against the baselines on each in turn.

    Args:
        shapes: (m, n) each. Default: 30 of 576×576 and 60 of 576×1536.
        rounds: timed turns. Default: 3.
        seed: of the generator. Default: 0.
        name: of the input. Default: "list of" and how many.

    >>> [row.method for row in measure_list([(4, 4), (4, 8)], rounds=1)]
    ['torch.optim.Muon', 'five steps in float32', 'auto']
    """
    generator = torch.Generator().manual_seed(seed)
    xs = [torch.randn(*shape, generator=generator) for shape in shapes]
    calls: dict[str, Callable[[], object]] = {
        name: lambda f=f: [f(x) for x in xs]  # type: ignore[misc]
        for name, f in BASELINES.items()
    }
    calls["auto"] = lambda: polar_list(xs)
    times = _take_turns(calls, rounds=rounds, warmup=1)
    rows = []
    for method in times:
        with count_products() as count:
            calls[method]()
        unknown = math.nan, math.nan
        title = name or f"list of {len(shapes)}"
        rows.append(_row(title, (0, 0), method, times, errors=unknown, flops=count.flops))
    return rows


def _row(
    name: str,
    shape: tuple[int, int],
    method: str,
    times: Mapping[str, Sequence[float]],
    *,
    errors: tuple[float, float],
    flops: int,
) -> Measurement:
    return Measurement(
        input=name,
        shape=shape,
        method=method,
        seconds=statistics.median(times[method]),
        ratio=_ratio(times[REFERENCE], times[method]),
        plain_ratio=_ratio(times[PLAIN], times[method]),
        polar_error=errors[0],
        orthogonality_error=errors[1],
        gflop=flops / 1e9,
    )


def geometric_mean(
    rows: Sequence[Measurement],
    shapes: Sequence[tuple[int, int]],
    *,
    method: str = "auto",
    baseline: str = REFERENCE,
) -> float:
    """Geometric mean of the speed ratios of one method over Gaussian inputs of the shapes; NaN without any.

    Args:
        rows: measurements.
        shapes: (m, n) each.
        method: its name. Default: "auto".
        baseline: against which. Default: torch.optim.Muon's function.
    """
    ratios = [
        r.speed_over(baseline)
        for r in rows
        if r.method == method and r.shape in shapes and r.input.startswith("gaussian")
    ]
    return statistics.geometric_mean(ratios) if ratios else math.nan


def pareto_front(rows: Sequence[Measurement]) -> list[Measurement]:
    """The measurements of one input than which none other is both faster and more accurate, by time."""
    front: list[Measurement] = []
    for row in sorted(rows, key=lambda r: (r.seconds, r.polar_error)):
        if not front or row.polar_error < front[-1].polar_error:
            front.append(row)
    return front


def _take_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    # A call finds the caches as the one before left them: after float32 steps all others are slower. So no two keep their places.
    order, shuffle = list(calls), random.Random(0).shuffle
    calls_a_turn = dict.fromkeys(calls, 1)
    for turn in range(warmup + rounds):
        shuffle(order)
        for name in order:
            call, spent = calls[name], times[name]
            if len(spent) >= FEWEST_TURNS and sum(spent) > BUDGET_S:
                continue
            seconds = _seconds(call, calls_a_turn[name])
            if turn >= warmup:
                spent.append(seconds)
            # The first calls of a process are slow: the fastest one so far decides how many make a turn.
            calls_a_turn[name] = max(calls_a_turn[name], math.ceil(SHORTEST_TURN_S / max(seconds, 1e-9)))
    return times


def _seconds(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _ratio(reference: Sequence[float], seconds: Sequence[float]) -> float:
    # Where one of the two sat out the last turns, they are compared in those that both took.
    return statistics.median(a / b for a, b in zip(reference, seconds, strict=False))


def _affordable(method: str, shape: tuple[int, int]) -> bool:
    return min(shape) <= LARGEST_EXACT or method not in (*EXACT, *BASES)


def _adaptive(error: float) -> Factor:
    return lambda x: adaptive(x, error=error)[0]


def _factor(method: str, schedule: str | None = None) -> Factor:
    return lambda x: polar(x, method=method, schedule=schedule)
