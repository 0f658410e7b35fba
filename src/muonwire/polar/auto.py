"""Polar factors, one or a list, by any method; and why the automatic choice takes which."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.adaptive import Report, adapt, reference_flops, resolves, roundoff
from muonwire.polar.device import device_polar
from muonwire.polar.exact import EXACT, exact_polar
from muonwire.polar.halley import halley_polar
from muonwire.polar.newton_schulz import gram_newton_schulz, newton_schulz
from muonwire.polar.prepare import NONFINITE, guard, prepare
from muonwire.polar.processor import Processor, find_processor
from muonwire.polar.schedules import Schedule, find

DEFAULT_ERROR = 0.02
# Dtypes in which LAPACK factorizes.
FACTORIZED = (torch.float32, torch.float64)
# Where the dtype is not given, a request below this is computed in float32 from the start.
SMALLEST_HALF_ERROR = 0.01
HALLEY_STEPS = "a Halley step and a quintic"


def polar(
    x: Tensor,
    *,
    method: str = "auto",
    schedule: Schedule | str | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: str | None = None,
    processor: Processor | None = None,
) -> Tensor:
    """Polar factor U Vᵀ of each matrix X = U S Vᵀ of ``x``: the nearest semi-orthogonal matrix.

    Args:
        x: (..., m, n), floating. A zero matrix has the zero matrix as its result, at any scale of the others.
        method: "auto": as accurate as torch.optim.Muon's function on the measured spectrum, in fewer
            products; "adaptive": polar error 0.02, checked (``adaptive`` takes other errors and reports);
            "halley": a Halley step and a quintic, in float32 or float64; "newton_schulz": the plain iteration of a
            schedule, scaled by ‖X‖_F; "gram": the same in the Gram form; "svd", "eigh", "newton", "qdwh": exact, slow.
        schedule: coefficients for newton_schulz and gram, or their name. Default: "polar_express".
        dtype: dtype of the products. Default: what the processor multiplies fastest at this size, see ``Processor``;
            float32 (or x's, if wider) for the exact methods.
        nonfinite: "raise", or "propagate" to get NaN for each matrix with a value that is not finite.
            Default: "raise" on CPU; "propagate" on accelerators, where raising would have to wait for the
                device.
        processor: the class whose dtype and sizes are followed. Default: that of x's device.

    Returns:
        (..., m, n), in the dtype of ``x``.

    Raises:
        UsageError: x is not a floating tensor of at least two dimensions, or not finite; method, schedule or
            nonfinite is unknown; a schedule is given for a method that takes none, or 16 bits for "halley".

    >>> q = polar(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), method="svd")
    >>> torch.allclose(q @ q.mT, torch.eye(4), atol=1e-5)
    True

    Source: Jordan et al., "Muon" (2024); Amsel et al., "The Polar Express", arXiv 2505.16932.
    """
    _check(x, method=method, schedule=schedule, nonfinite=nonfinite)
    if x.numel() == 0:
        return x.clone()
    options = Options(
        schedule=find(schedule, operation="polar"),
        dtype=dtype,
        nonfinite=nonfinite or ("raise" if x.device.type == "cpu" else "propagate"),
        processor=processor or find_processor(x.device),
    )
    return _METHODS[method](x, options).to(x.dtype)


class Options(NamedTuple):
    """The options of ``polar`` with its defaults filled in; a named tuple, since small matrices take microseconds.

    Args:
        schedule: coefficients for newton_schulz and gram.
        dtype: of the products, where the caller asked for one.
        nonfinite: "raise" or "propagate".
        processor: the class whose dtype and sizes are followed.
    """

    schedule: Schedule
    dtype: torch.dtype | None
    nonfinite: str
    processor: Processor


def _check(x: Tensor, *, method: str, schedule: Schedule | str | None, nonfinite: str | None) -> None:
    if x.ndim < 2 or not x.is_floating_point():
        raise UsageError(
            f"polar: x is {x.dtype} of shape {tuple(x.shape)}; it takes floating (..., m, n). Reshape a "
            "vector or a convolution's weight to a matrix first"
        )
    if method not in METHODS:
        raise UsageError(f"polar: method is {method!r}; allowed are {', '.join(METHODS)}")
    if schedule is not None and method not in ("newton_schulz", "gram"):
        raise UsageError(
            f"polar: schedule is given, but method {method!r} takes none; use newton_schulz or gram"
        )
    if nonfinite is not None and nonfinite not in NONFINITE:
        raise UsageError(f"polar: nonfinite is {nonfinite!r}; allowed are {', '.join(NONFINITE)}, or None")


def _auto(x: Tensor, options: Options) -> Tensor:
    """A stack of small matrices in one call; else one by one, with the spectrum measured where that saves more than it costs."""
    shape, count = (x.shape[-2], x.shape[-1]), math.prod(x.shape[:-2])
    row = options.processor
    if x.device.type != "cpu":
        return _on_device(x, options)
    if row.stacks(shape) if count > 1 else not row.measures(shape):
        method, dtype = _unmeasured(x, options)
        return _METHODS[method](x, options._replace(dtype=dtype))
    if row.measures(shape):
        return _measured(x, options, error=None)
    return torch.stack([_auto(m, options) for m in x.reshape(-1, *shape)]).reshape(x.shape)


def _unmeasured(x: Tensor, options: Options) -> tuple[str, torch.dtype]:
    """Method and dtype for one matrix or a stack whose spectra are not measured."""
    dtype = _dtype_of_stack(x, options)
    return ("halley" if dtype in FACTORIZED else "newton_schulz"), dtype


def _adaptive(x: Tensor, options: Options) -> Tensor:
    on_cpu = x.device.type == "cpu"
    return _measured(x, options, error=DEFAULT_ERROR) if on_cpu else _on_device(x, options)


def _on_device(x: Tensor, options: Options) -> Tensor:
    result = device_polar(x, dtype=options.dtype or options.processor.dtype)
    return guard(x, result, nonfinite=options.nonfinite)


def _measured(x: Tensor, options: Options, *, error: float | None) -> Tensor:
    """Each matrix by the schedule for its own spectrum; ``error`` as for ``adapt``."""
    matrices = x.reshape(-1, *x.shape[-2:])
    results = [_measured_one(m, options, error=error)[0] for m in matrices]
    # One usual matrix is not copied.
    return (results[0] if len(results) == 1 else torch.stack(results)).reshape(x.shape)


def _measured_one(matrix: Tensor, options: Options, *, error: float | None) -> tuple[Tensor, Report | None]:
    """Polar factor of one matrix in its own dtype; no report where it is zero or not finite."""
    dtype, float32 = options.dtype or options.processor.dtype, torch.float32
    # Where no dtype was asked for, a request that is too fine for the processor's goes to float32.
    may_widen = error is not None and options.dtype is None and roundoff(dtype) > roundoff(float32)
    if may_widen and error is not None and error < SMALLEST_HALF_ERROR:
        dtype, may_widen = float32, False
    ready = prepare(matrix, dtype=dtype, nonfinite=options.nonfinite)
    if isinstance(ready, Tensor):
        return ready, None
    y, gram = ready
    shape = (matrix.shape[0], matrix.shape[1])
    if not may_widen or error is None or resolves(gram, shape, error=error):
        result, report = adapt(y, gram, error=error)
        if not may_widen or report.reached:
            return result.to(matrix.dtype), report
    return _measured_one(matrix, options._replace(dtype=float32), error=error)


def _halley(x: Tensor, options: Options) -> Tensor:
    dtype = options.dtype or torch.promote_types(x.dtype, torch.float32)
    if dtype not in FACTORIZED:
        raise UsageError(
            f"polar: dtype is {dtype}, but method 'halley' factorizes; allowed are float32 and float64"
        )
    return halley_polar(x, dtype=dtype, nonfinite=options.nonfinite)


def _iterated(iterate: Callable[..., Tensor]) -> Callable[[Tensor, Options], Tensor]:
    def run(x: Tensor, options: Options) -> Tensor:
        result = iterate(x, schedule=options.schedule, dtype=_dtype_of_stack(x, options))
        return guard(x, result, nonfinite=options.nonfinite)

    return run


def _dtype_of_stack(x: Tensor, options: Options) -> torch.dtype:
    shape = (x.shape[-2], x.shape[-1])
    return options.dtype or options.processor.dtype_of(shape, count=math.prod(x.shape[:-2]))


def _exact(method: str) -> Callable[[Tensor, Options], Tensor]:
    return lambda x, options: exact_polar(x, method=method, dtype=options.dtype, nonfinite=options.nonfinite)


_METHODS: dict[str, Callable[[Tensor, Options], Tensor]] = {
    "auto": _auto,
    "adaptive": _adaptive,
    "halley": _halley,
    "newton_schulz": _iterated(newton_schulz),
    "gram": _iterated(gram_newton_schulz),
    **{name: _exact(name) for name in EXACT},
}
METHODS = tuple(_METHODS)


def polar_list(
    xs: Sequence[Tensor],
    *,
    method: str = "auto",
    schedule: Schedule | str | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: str | None = None,
    processor: Processor | None = None,
) -> list[Tensor]:
    """Polar factors of a list of tensors of mixed shapes, in its order.

    Those of one shape (or its transpose), dtype and device are stacked into one call on accelerators, and on CPUs up to the size
    to which that is faster there (see ``Processor``): a stack is iterated plainly, without a look at each spectrum. Larger ones
    on CPUs run one after another in the same buffers, which stay in the cache.

    Args:
        xs: tensors as ``polar`` takes them.
        method, schedule, dtype, nonfinite, processor: as for ``polar``.

    Raises:
        UsageError: as for ``polar``.

    >>> [tuple(q.shape) for q in polar_list([torch.eye(2), torch.ones(3, 2), torch.eye(2)], method="svd")]
    [(2, 2), (3, 2), (2, 2)]
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, x in enumerate(xs):
        groups.setdefault((_wide(x).shape, x.dtype, x.device), []).append(index)
    results: list[Tensor | None] = [None] * len(xs)
    for members in groups.values():
        first = xs[members[0]]
        stacked = len(members) > 1 and first.numel() > 0 and first.ndim >= 2
        if stacked and first.device.type == "cpu":
            stacked = (processor or find_processor(first.device)).stacks((first.shape[-2], first.shape[-1]))
        calls = [torch.stack([_wide(xs[i]) for i in members])] if stacked else [xs[i] for i in members]
        made = [
            polar(x, method=method, schedule=schedule, dtype=dtype, nonfinite=nonfinite, processor=processor)
            for x in calls
        ]
        for index, result in zip(members, made[0].unbind() if stacked else made, strict=True):
            results[index] = result if result.shape == xs[index].shape else result.mT
    assert all(r is not None for r in results), "every index is in one group"
    return [r for r in results if r is not None]


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.ndim >= 2 and x.shape[-2] > x.shape[-1] else x


def adaptive(
    x: Tensor, *, error: float = DEFAULT_ERROR, dtype: torch.dtype | None = None, nonfinite: str | None = None
) -> tuple[Tensor, list[Report]]:
    """Polar factor to a requested polar error, with a report per matrix that says what was reached.

    The spectrum is measured, the schedule of fewest products is run, and the result's own Gram matrix gives
    a bound; where that falls short, it goes on. A matrix of too large a condition number for the dtype falls
    short all the same, and its report says so: ``reached`` is False and ``unresolved`` or ``rounding_floor``
    says why.

    Args:
        x: (..., m, n), floating, on any device; numbers are read back to the host.
        error: polar error ‖P − U Vᵀ‖_F/‖U Vᵀ‖_F. Default: 0.02.
        dtype: of the products. Default: the processor's fastest where its rounding allows the error, else
            float32.
        nonfinite: as for ``polar``.

    Returns:
        (..., m, n) in the dtype of ``x``, and one report per nonzero finite matrix in order.

    Raises:
        UsageError: error is not positive; x as for ``polar``.

    >>> q, reports = adaptive(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)), error=1e-3)
    >>> reports[0].reached, reports[0].bound < 2e-3
    (True, True)
    """
    _check(x, method="adaptive", schedule=None, nonfinite=nonfinite)
    if not error > 0:
        raise UsageError(f"adaptive: error is {error!r}; a polar error is positive, such as 0.02")
    if x.numel() == 0:
        return x.clone(), []
    options = Options(
        schedule=find(None, operation="adaptive"),
        dtype=dtype,
        nonfinite=nonfinite or "raise",
        processor=find_processor(x.device),
    )
    pairs = [_measured_one(m, options, error=error) for m in x.reshape(-1, *x.shape[-2:])]
    return torch.stack([q for q, _ in pairs]).reshape(x.shape), [r for _, r in pairs if r is not None]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What ``polar(x)`` does for one matrix, and why.

    Args:
        method: "adaptive", "device", "halley", "newton_schulz" or "zero".
        dtype: of the products.
        reason: in words.
        report: the adaptive report, where the spectrum was measured.
    """

    method: str
    dtype: torch.dtype
    reason: str
    report: Report | None

    def __str__(self) -> str:
        return f"{self.method} in {self.dtype}: {self.reason}"


def explain(x: Tensor, *, dtype: torch.dtype | None = None) -> Explanation:
    """Say what ``polar(x)`` with method "auto" chooses for the first matrix of ``x``, and why.

    Args:
        x: as for ``polar``, not empty.
        dtype: as for ``polar``.

    Raises:
        UsageError: x is empty, or as for ``polar``.

    >>> x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    >>> choice = explain(x, dtype=torch.float32)
    >>> choice.method, choice.report.flops < choice.report.reference_flops / 3
    ('adaptive', True)
    """
    _check(x, method="auto", schedule=None, nonfinite=None)
    if x.numel() == 0:
        raise UsageError(f"explain: x is empty, of shape {tuple(x.shape)}; it takes at least one matrix")
    matrix = x.reshape(-1, *x.shape[-2:])[0]
    shape = (matrix.shape[0], matrix.shape[1])
    row = find_processor(x.device)
    options = Options(schedule=find(None, operation="explain"), dtype=dtype, nonfinite="raise", processor=row)
    chosen = dtype or row.dtype
    source = (
        f"dtype as asked, processor class {row.name}"
        if dtype
        else f"dtype of processor class {row.name} ({row.has})"
    )
    if x.device.type != "cpu":
        text = (
            "six iterations with fixed coefficients, since a look at the spectrum costs an accelerator more"
        )
        return Explanation(method="device", dtype=chosen, reason=f"{text}; {source}", report=None)
    if not row.measures(shape):
        method, chosen = _unmeasured(matrix, options)
        how = HALLEY_STEPS if method == "halley" else options.schedule.name
        text = f"so small that measuring the spectrum costs more than it saves: {how}"
        return Explanation(method=method, dtype=chosen, reason=f"{text}; {source}", report=None)
    _, report = _measured_one(matrix, options, error=None)
    if report is None:
        return Explanation(method="zero", dtype=chosen, reason="the matrix is zero", report=None)
    steps = " then ".join(f"{p.schedule.name} restarting before steps {p.restarts}" for p in report.plans)
    text = (
        f"{steps or HALLEY_STEPS}: {report.flops / 1e9:.2f} GFLOP against {reference_flops(shape) / 1e9:.2f} of "
        f"torch.optim.Muon, polar error {report.expected_error:.3f} expected against {report.reference_error:.3f}; at most "
        f"{report.bound:.3f} on the {report.covered:.0%} of the spectrum in the interval; {source}"
    )
    return Explanation(method="adaptive", dtype=chosen, reason=text, report=report)
