"""The front door: one polar factor, many, or an explanation of how it would be made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.polar.adaptive import Report, adapt, resolves, roundoff
from muonwire.polar.device import device_polar
from muonwire.polar.exact import eigh_polar, svd_polar
from muonwire.polar.newton import scaled_newton
from muonwire.polar.newton_schulz import gram_newton_schulz, newton_schulz
from muonwire.polar.precision import measure_speed, product_dtype
from muonwire.polar.prepare import NONFINITE, nonfinite_message, prepare
from muonwire.polar.products import plain_flops
from muonwire.polar.qdwh import qdwh
from muonwire.polar.reference import reference_flops
from muonwire.polar.schedules import POLAR_EXPRESS, Schedule, find

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "svd": svd_polar,
    "eigh": eigh_polar,
    "newton": scaled_newton,
    "qdwh": qdwh,
}
METHODS = ("auto", "adaptive", "newton_schulz", "gram", *EXACT)
DEFAULT_ERROR = 0.02
# Below this min(m, n) measuring the spectrum takes longer than the products that it saves.
SMALLEST_MEASURED = 192
# Up to this m²n several matrices of one shape take less time as one batch of plain iterations in half precision: about 384×1024.
LARGEST_STACKED = 1.5e8
# Where the dtype is not given, a request below this is computed in float32 from the start.
SMALLEST_HALF_ERROR = 0.01


def polar(
    x: Tensor,
    *,
    method: str = "auto",
    schedule: Schedule | str | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: str | None = None,
) -> Tensor:
    """Polar factor U Vᵀ of each matrix X = U S Vᵀ of ``x``: the nearest semi-orthogonal matrix.

    Args:
        x: (..., m, n), floating. A zero matrix has the zero matrix as its result, at any scale of the others.
        method: "auto": as accurate as torch.optim.Muon's function on the measured spectrum, in fewer
            products; "adaptive": polar error 0.02, checked (``adaptive`` takes other errors and reports);
            "newton_schulz": the plain iteration of a schedule, scaled by ‖X‖_F; "gram": the same in the Gram
            form; "svd", "eigh", "newton", "qdwh": exact, slow.
        schedule: coefficients for newton_schulz and gram, or their name. Default: "polar_express".
        dtype: dtype of the products. Default: the fastest as measured for auto and adaptive, bfloat16 for
            newton_schulz and gram, float32 (or x's, if wider) for the exact methods.
        nonfinite: "raise", or "propagate" to get NaN for each matrix with a value that is not finite.
            Default: "raise" on CPU; "propagate" on accelerators, where raising would have to wait for the
                device.

    Returns:
        (..., m, n), in the dtype of ``x``.

    Raises:
        UsageError: x is not a floating tensor of at least two dimensions, or not finite; method, schedule or
            nonfinite is unknown; a schedule is given for a method that takes none.

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
    if method in ("newton_schulz", "gram"):
        run = newton_schulz if method == "newton_schulz" else gram_newton_schulz
        result = run(x, schedule=find(schedule, operation="polar"), dtype=dtype or torch.bfloat16).to(x.dtype)
        return _guard(x, result, policy=policy)
    if x.device.type != "cpu":
        return _guard(x, device_polar(x, dtype=dtype or product_dtype(x.device)).to(x.dtype), policy=policy)
    error = None if method == "auto" else DEFAULT_ERROR
    if error is None and min(x.shape[-2:]) < SMALLEST_MEASURED:
        return _guard(x, _small(x, dtype=dtype).to(x.dtype), policy=policy)
    results = [_one(m, error=error, dtype=dtype, policy=policy)[0] for m in x.reshape(-1, *x.shape[-2:])]
    return results[0].reshape(x.shape) if len(results) == 1 else torch.stack(results).reshape(x.shape)


def polar_list(
    xs: Sequence[Tensor],
    *,
    method: str = "auto",
    schedule: Schedule | str | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: str | None = None,
) -> list[Tensor]:
    """Polar factors of a list of tensors of mixed shapes, in its order.

    On accelerators, and for small matrices, those of one shape (or its transpose), dtype and device are stacked into one call;
    larger ones on CPU run one after another in the same buffers, which stay in the cache. With "auto" in half precision several
    matrices of one shape are stacked up to m²n = 1.5·10⁸, n the longer side, and iterated plainly: on CPUs with half-precision
    products a batch is faster than measuring each spectrum, which takes a time of its own.

    Args:
        xs: tensors as ``polar`` takes them.
        method: as for ``polar``.
        schedule: as for ``polar``.
        dtype: as for ``polar``.
        nonfinite: as for ``polar``.

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
        named, coefficients = method, schedule
        stacked = len(members) > 1 and first.numel() > 0 and first.ndim >= 2
        if stacked and not _is_small(first):
            stacked = method == "auto" and _batch_pays(first, dtype)
            if stacked:
                named, coefficients = "newton_schulz", POLAR_EXPRESS
        calls = [torch.stack([_wide(xs[i]) for i in members])] if stacked else [xs[i] for i in members]
        made = [
            polar(x, method=named, schedule=coefficients, dtype=dtype, nonfinite=nonfinite) for x in calls
        ]
        for index, result in zip(members, made[0].unbind() if stacked else made, strict=True):
            results[index] = result if result.shape == xs[index].shape else result.mT
    assert all(r is not None for r in results), "every index is in one group"
    return [r for r in results if r is not None]


def _wide(x: Tensor) -> Tensor:
    return x.mT if x.ndim >= 2 and x.shape[-2] > x.shape[-1] else x


def _is_small(x: Tensor) -> bool:
    return x.device.type != "cpu" or min(x.shape[-2:]) < SMALLEST_MEASURED


def _batch_pays(x: Tensor, dtype: torch.dtype | None) -> bool:
    short, long = sorted(x.shape[-2:])
    return dtype in (torch.bfloat16, torch.float16) and short * short * long <= LARGEST_STACKED


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
        dtype: of the products. Default: the fastest as measured where its rounding allows the error, else
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
    pairs = [
        _one(m, error=error, dtype=dtype, policy=nonfinite or "raise") for m in x.reshape(-1, *x.shape[-2:])
    ]
    return torch.stack([q for q, _ in pairs]).reshape(x.shape), [r for _, r in pairs if r is not None]


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What ``polar(x)`` does for one matrix, and why.

    Args:
        method: "adaptive", "device", "newton_schulz", "gram" or "zero".
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
    chosen = dtype or product_dtype(x.device)
    if dtype is None:
        speeds = measure_speed(x.device).gflops
        why = "fastest dtype here: " + ", ".join(f"{str(d)[6:]} {g:.0f} GF/s" for d, g in speeds.items())
    else:
        why = "dtype as asked"
    if x.device.type != "cpu":
        text = "fixed number of iterations, coefficients gathered on the device by the measured spectrum"
        return Explanation(method="device", dtype=chosen, reason=f"{text}; {why}", report=None)
    if min(shape) < SMALLEST_MEASURED:
        method = _small_method(shape)
        text = f"min(m, n) < {SMALLEST_MEASURED}, where measuring costs more than it saves: polar_express"
        return Explanation(method=method, dtype=dtype or torch.bfloat16, reason=f"{text}; {why}", report=None)
    _, report = _one(matrix, error=None, dtype=chosen, policy="raise")
    if report is None:
        return Explanation(method="zero", dtype=chosen, reason="the matrix is zero", report=None)
    steps = " then ".join(f"{p.schedule.name} restarting before steps {p.restarts}" for p in report.plans)
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
    matrix: Tensor, *, error: float | None, dtype: torch.dtype | None, policy: str
) -> tuple[Tensor, Report | None]:
    wide = dtype or product_dtype(matrix.device)
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
            return _one(matrix, error=error, dtype=torch.float32, policy=policy)
    result, report = adapt(ready.y, error=error, gram=ready.gram)
    if narrow and not report.reached:
        return _one(matrix, error=error, dtype=torch.float32, policy=policy)
    return result.to(matrix.dtype), report


def _small_method(shape: tuple[int, int]) -> str:
    # The Gram form takes several times as many calls, and those cost more than products this small.
    return "gram" if max(shape) >= 8 * min(shape) else "newton_schulz"


def _small(x: Tensor, *, dtype: torch.dtype | None) -> Tensor:
    return newton_schulz(x, schedule=POLAR_EXPRESS, dtype=dtype or torch.bfloat16)


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


def _guard(x: Tensor, result: Tensor, *, policy: str) -> Tensor:
    if policy == "raise" and not bool(torch.isfinite(result.sum())) and not bool(torch.isfinite(x).all()):
        raise UsageError(nonfinite_message(x, operation="polar"))
    return result


def count_small(shape: tuple[int, int]) -> int:
    """FLOPs that ``polar`` takes on a matrix too small to be measured.

    >>> count_small((64, 64)) == reference_flops((64, 64))
    True
    """
    return plain_flops(POLAR_EXPRESS, *shape)
