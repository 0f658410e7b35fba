"""The front door: one polar factor, many, or an explanation of how it would be made."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.adaptive import Report, adapt, resolves, roundoff
from muonwire.polar.device import device_polar
from muonwire.polar.exact import eigh_polar, svd_polar
from muonwire.polar.halley import halley_polar
from muonwire.polar.newton import scaled_newton
from muonwire.polar.newton_schulz import gram_newton_schulz, newton_schulz
from muonwire.polar.prepare import NONFINITE, guard, nonfinite_message, prepare
from muonwire.polar.processor import Processor, find_processor
from muonwire.polar.qdwh import qdwh
from muonwire.polar.reference import reference_flops
from muonwire.polar.schedules import POLAR_EXPRESS, Schedule, find

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": svd_polar,
    "eigh": eigh_polar,
    "newton": scaled_newton,
    "qdwh": qdwh,
}
METHODS = ("auto", "adaptive", "halley", "newton_schulz", "gram", *EXACT)
DEFAULT_ERROR = 0.02
# Dtypes in which LAPACK factorizes.
FACTORIZED = (torch.float32, torch.float64)
# Where the dtype is not given, a request below this is computed in float32 from the start.
SMALLEST_HALF_ERROR = 0.01


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
    policy = nonfinite or ("raise" if x.device.type == "cpu" else "propagate")
    if method in EXACT:
        return _exact(x, method=method, dtype=dtype, policy=policy)
    row = processor or find_processor(x.device)
    shape, count = (x.shape[-2], x.shape[-1]), math.prod(x.shape[:-2])
    if method in ("newton_schulz", "gram"):
        run = newton_schulz if method == "newton_schulz" else gram_newton_schulz
        chosen = dtype or row.dtype_of(shape, count=count)
        result = run(x, schedule=find(schedule, operation="polar"), dtype=chosen).to(x.dtype)
        return guard(x, result, nonfinite=policy)
    if method == "halley":
        wide = dtype or torch.promote_types(x.dtype, torch.float32)
        if wide not in FACTORIZED:
            raise UsageError(
                f"polar: dtype is {wide}, but method 'halley' factorizes; allowed are float32 and float64"
            )
        return halley_polar(x, dtype=wide, nonfinite=policy).to(x.dtype)
    if x.device.type != "cpu":
        return guard(x, device_polar(x, dtype=dtype or row.dtype).to(x.dtype), nonfinite=policy)
    if method == "auto" and (row.stacks(shape) if count > 1 else not row.measures(shape)):
        chosen = dtype or row.dtype_of(shape, count=count)
        if chosen in FACTORIZED:
            made = halley_polar(x, dtype=chosen, nonfinite=policy)
        else:
            made = guard(x, newton_schulz(x, schedule=POLAR_EXPRESS, dtype=chosen), nonfinite=policy)
        return made if made.dtype == x.dtype else made.to(x.dtype)
    if method == "auto" and not row.measures(shape):
        matrices = x.reshape(-1, *shape).unbind()
        return torch.stack(
            [polar(m, dtype=dtype, nonfinite=policy, processor=row) for m in matrices]
        ).reshape(x.shape)
    error = None if method == "auto" else DEFAULT_ERROR
    wide = dtype or row.dtype
    results = [_one(m, error=error, dtype=dtype, wide=wide, policy=policy)[0] for m in x.reshape(-1, *shape)]
    return results[0].reshape(x.shape) if len(results) == 1 else torch.stack(results).reshape(x.shape)


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
        method: as for ``polar``.
        schedule: as for ``polar``.
        dtype: as for ``polar``.
        nonfinite: as for ``polar``.
        processor: as for ``polar``.

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
    tells why.

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
    wide = dtype or find_processor(x.device).dtype
    pairs = [
        _one(m, error=error, dtype=dtype, wide=wide, policy=nonfinite or "raise")
        for m in x.reshape(-1, *x.shape[-2:])
    ]
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
    >>> told = explain(x, dtype=torch.float32)
    >>> told.method, told.report.flops < told.report.reference_flops / 3
    ('adaptive', True)
    """
    _check(x, method="auto", schedule=None, nonfinite=None)
    if x.numel() == 0:
        raise UsageError(f"explain: x is empty, of shape {tuple(x.shape)}; it takes at least one matrix")
    matrix = x.reshape(-1, *x.shape[-2:])[0]
    shape = (matrix.shape[0], matrix.shape[1])
    row = find_processor(x.device)
    why = (
        f"dtype as asked, processor class {row.name}"
        if dtype
        else f"dtype of processor class {row.name} ({row.has})"
    )
    if x.device.type != "cpu":
        text = "fixed number of iterations, coefficients gathered on the device by the measured spectrum"
        return Explanation(method="device", dtype=dtype or row.dtype, reason=f"{text}; {why}", report=None)
    if not row.measures(shape):
        chosen = dtype or row.dtype_of(shape)
        method, how = (
            ("halley", "a Halley step and a quintic")
            if chosen in FACTORIZED
            else ("newton_schulz", "polar_express")
        )
        text = f"so small that measuring the spectrum costs more than it saves: {how}"
        return Explanation(method=method, dtype=chosen, reason=f"{text}; {why}", report=None)
    chosen = dtype or row.dtype
    _, report = _one(matrix, error=None, dtype=dtype, wide=chosen, policy="raise")
    if report is None:
        return Explanation(method="zero", dtype=chosen, reason="the matrix is zero", report=None)
    steps = " then ".join(f"{p.schedule.name} restarting before steps {p.restarts}" for p in report.plans)
    steps = steps or "a Halley step and a quintic"
    text = (
        f"{steps}: {report.flops / 1e9:.2f} GFLOP against {reference_flops(shape) / 1e9:.2f} of "
        f"torch.optim.Muon, polar error {report.expected_error:.3f} expected against "
        f"{report.reference_error:.3f}; at most {report.bound:.3f} on the {report.covered:.0%} of the "
        f"spectrum in the interval; {why}"
    )
    return Explanation(method="adaptive", dtype=chosen, reason=text, report=report)


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


def _one(
    matrix: Tensor, *, error: float | None, dtype: torch.dtype | None, wide: torch.dtype, policy: str
) -> tuple[Tensor, Report | None]:
    # ``wide`` is what the products run in; where no dtype was asked for, a request too fine for it goes to float32.
    if (
        dtype is None
        and error is not None
        and error < SMALLEST_HALF_ERROR
        and roundoff(wide) > roundoff(torch.float32)
    ):
        wide = torch.float32
    ready = prepare(matrix, dtype=wide, nonfinite=policy, operation="polar")
    if ready.result is not None:
        return ready.result, None
    assert ready.y is not None
    assert ready.gram is not None
    narrow = dtype is None and error is not None and roundoff(wide) > roundoff(torch.float32)
    if narrow and error is not None:
        shape = (matrix.shape[0], matrix.shape[1])
        if not resolves(ready.gram, shape, error=error):
            return _one(matrix, error=error, dtype=dtype, wide=torch.float32, policy=policy)
    result, report = adapt(ready.y, error=error, gram=ready.gram)
    if narrow and not report.reached:
        return _one(matrix, error=error, dtype=dtype, wide=torch.float32, policy=policy)
    return result.to(matrix.dtype), report


def _exact(x: Tensor, *, method: str, dtype: torch.dtype | None, policy: str) -> Tensor:
    wide = x.to(dtype or torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(dim=(-2, -1), keepdim=True)
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        if policy == "raise":
            raise UsageError(nonfinite_message(x, operation="polar"))
        wide, largest = torch.where(finite, wide, 0.0), torch.where(finite, largest, 1.0)
    zero = largest == 0
    # A zero matrix has no inverse for newton; the identity stands in for it and is masked.
    eye = torch.eye(*x.shape[-2:], dtype=wide.dtype, device=x.device)
    result = EXACT[method](torch.where(zero, eye, wide / torch.where(zero, 1.0, largest)))
    result = torch.where(zero, 0.0, result)
    return torch.where(finite, result, float("nan")).to(x.dtype)
