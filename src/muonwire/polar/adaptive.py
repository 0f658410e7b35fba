"""Adaptive polar factors: measure the spectrum, then run the schedule of fewest products for it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.gram import gram_iteration, kept_gram, symmetric_flops, uses_blocks
from muonwire.polar.halley import HALLEY_ERROR, LOWER, halley, halley_cost, halley_flops, halley_map
from muonwire.polar.plans import (
    CENTERS,
    EDGES,
    NOISE_LIMIT,
    SPREADS,
    Plan,
    choose_plan,
    plain_is_cheaper,
    resolution,
    rounding_noise,
)
from muonwire.polar.products import gram_flops, plain_flops
from muonwire.polar.restarts import derive_restarts
from muonwire.polar.schedules import JORDAN, mixed
from muonwire.polar.spectrum import Spectrum, measure_spectrum

# The estimate of the reference's error and of our own come from the same nodes; this is what they differ by.
REFERENCE_MARGIN = 0.85
# A schedule is chosen for this fraction of a requested error, since the spectrum is an estimate.
CHOICE_MARGIN = 0.8
# A spectrum is measured again after two growing iterations when more than this fraction lies below this
# value: Lanczos sees the squares of the singular values, and cannot separate the smallest ones.
HARD_VALUE = 0.06
HARD_FRACTION = 0.1
# Values above the growing iterations' own lower end keep clear of those below it: folding a flat spectrum
# down to where the noise is would lose it.
GROWTH = mixed(lower=2.0**-5, degrees=(5, 5), safety=1.02)
MAX_GROWTHS = 4
# An iterate with no value under this has none that could be noise.
CLEAR_VALUE = 0.4
MAX_ATTEMPTS = 4
# Root mean square of the singular values that an iteration may leave. No schedule makes more than 2 of a value up to ``upper``; of
# one above it each step makes a power.
LARGEST_VALUE = 2.0
# The growing iterations keep the order of the singular values up to here.
GROWTH_MONOTONE = 0.06


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to one matrix and what is known of the result.

    Args:
        shape: (m, n).
        dtype: of the products.
        plans: what ran, in order: growing iterations first where small values had to be told apart. Empty where ``halley``
            ran, which takes less time than any plan as accurate.
        flops: FLOPs of the matrix products and factorizations, checks included.
        requested_error: what the plan was chosen for.
        expected_error: polar error over the measured spectrum, rounding included.
        bound: certified bound of the polar error in exact arithmetic: measured on the result where it was
            checked, else the schedule's on the covered interval.
        covered: fraction of the singular values for which ``bound`` holds.
        unresolved: fraction of the result's singular values under ½, where the result was checked: zeros, or
            values so small that the dtype cannot tell them from zero.
        rounding_floor: polar error that rounding the entries alone accounts for.
        reference_error: expected of torch.optim.Muon's function on the same spectrum.
        reference_flops: what that function takes.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    plans: tuple[Plan, ...]
    flops: int
    requested_error: float
    expected_error: float
    bound: float
    covered: float
    unresolved: float
    rounding_floor: float
    reference_error: float
    reference_flops: int

    @property
    def reached(self) -> bool:
        """Whether the requested error is expected of the result."""
        return self.expected_error <= self.requested_error


@dataclass(kw_only=True)
class _Work:
    # One matrix on its way: the iterate, its Gram matrix, what is known of its spectrum, and what was spent.
    y: Tensor
    gram: Tensor
    spectrum: Spectrum
    noise: float
    plans: list[Plan]
    flops: int = 0

    @property
    def blocks(self) -> bool:
        r, s = min(self.y.shape), max(self.y.shape)
        return uses_blocks(r, s, dtype=self.y.dtype, device=self.y.device)

    def grown_noise(self, plan: Plan) -> float:
        at = np.linspace(0.0, min(self.noise / plan.scale, 1.0), 33)
        return float(np.abs(plan.schedule.apply(at)).max())

    def run(self, plan: Plan, choose: Callable[[Spectrum], Plan]) -> Plan:
        shape = (self.y.shape[0], self.y.shape[1])
        y = self._iterated(plan)
        # Not at most, so that NaN is too large.
        if not float(torch.linalg.vector_norm(y, dtype=torch.float32)) <= LARGEST_VALUE * min(shape) ** 0.5:
            # A singular value above ``upper``, which no probe has seen. None is above ‖R‖_F^½.
            self.flops += plan.flops
            self.gram = kept_gram(self.y)
            above = float(torch.linalg.vector_norm(self.gram.float())) ** 0.5
            self.spectrum = replace(self.spectrum, upper=above)
            plan = choose(self.spectrum)
            y = self._iterated(plan)
        self.y = y
        self.plans.append(plan)
        self.flops += plan.flops
        grown = self.grown_noise(plan)
        stored = rounding_noise(frobenius=min(shape) ** 0.5, shape=shape, roundoff=roundoff(self.y.dtype))
        self.noise = float(np.hypot(grown, stored))
        return plan

    def _iterated(self, plan: Plan) -> Tensor:
        return gram_iteration(
            self.y, schedule=plan.schedule, restarts=plan.restarts, scale=plan.scale, gram=self.gram
        )

    def measure(self) -> None:
        self.gram = kept_gram(self.y)
        self.spectrum = measure_spectrum(self.gram)


def roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff: the largest relative error of rounding to nearest.

    >>> roundoff(torch.bfloat16) == 2**-8
    True
    """
    return torch.finfo(dtype).eps / 2


def adapt(y: Tensor, gram: Tensor, *, error: float | None) -> tuple[Tensor, Report]:
    """Polar factor of one finite, well-scaled, nonzero matrix, decisions made on the host.

    Args:
        y: (m, n), in the dtype of the products, with ‖Y‖_F within 1e±6 (float16: near 1).
        gram: ``gram_matrix(y)``; overwritten.
        error: polar error to reach, whatever it takes; the result is checked, and worked on again where it
            falls short. None: that of torch.optim.Muon's function on the measured spectrum, at no more FLOPs
            than it takes, unchecked; in float32 or wider by ``halley``, where that takes less time.

    Returns:
        (m, n) in the dtype of ``y``, and the report.
    """
    shape = (y.shape[0], y.shape[1])
    unit = roundoff(y.dtype)
    first = measure_spectrum(gram)
    if y.dtype == torch.float16:
        # Its range is too small for coefficients to carry the scale.
        y, gram, first = y / first.upper, gram / first.upper**2, first.scaled(1 / first.upper)
    noise = rounding_noise(frobenius=first.frobenius, shape=shape, roundoff=unit)
    work = _Work(y=y, gram=gram, spectrum=first, noise=noise, plans=[])
    values, mass = CENTERS * first.upper, first.mass(EDGES)
    seen = resolution(values, noise=noise)
    threshold = HARD_FRACTION if error is None else error**2
    most, hard = None, False
    if error is None and unit <= roundoff(torch.float32):
        most, hard = halley_cost(*shape, blocks=work.blocks), _is_hard(work, threshold)
    else:
        _grow(work, shape, threshold=threshold, error=error)
    if work.plans:
        grown = work.spectrum if len(work.plans) == 1 else None
        mass = _merge(first, grown) if grown is not None else mass
    floor = seen.floor(mass)
    # What torch.optim.Muon does with the same spectrum is the yardstick.
    reference = seen.error(mass, JORDAN.apply(values / first.frobenius))
    limit = reference_flops(shape)
    requested = REFERENCE_MARGIN * reference if error is None else error
    expected, bound, covered, unresolved = 1.0, 1.0, 1.0, 0.0
    for attempt in range(1 if error is None else MAX_ATTEMPTS):
        clear = work.spectrum.smallest >= CLEAR_VALUE * work.spectrum.upper
        choose = partial(
            choose_plan,
            shape=shape,
            error=requested if error is None else CHOICE_MARGIN * error / (1 + attempt),
            roundoff=unit,
            noise=0.0 if attempt and clear else work.noise,
            blocks=work.blocks,
            max_flops=limit - work.flops if error is None else None,
        )
        plan = choose(work.spectrum)
        if most is not None and (hard or plan.flops > most or plan.expected_error > requested):
            work.y = halley(work.y, gram=work.gram, upper=first.upper)
            work.flops = halley_flops(*shape, blocks=work.blocks)
            expected = seen.error(mass, halley_map(CENTERS))
            bound, covered = HALLEY_ERROR, float(mass[EDGES[:-1] >= LOWER].sum())
            break
        if attempt and not clear and work.grown_noise(plan) > NOISE_LIMIT:
            break
        before = work.y
        plan = work.run(plan, choose)
        if error is None:
            expected, bound, covered = plan.expected_error, plan.worst_error, plan.covered
            break
        work.measure()
        work.flops += symmetric_flops(min(shape), max(shape), blocks=work.blocks)
        checked, defect = _check(work)
        checked = float(np.hypot(checked, floor))
        if attempt and checked > expected:
            work.y = before
            break
        last, expected, bound = expected, checked, defect
        unresolved = float(work.spectrum.fraction_below(np.array([0.5 / work.spectrum.upper]))[0])
        if expected <= requested or checked > 0.8 * last:
            break
    return work.y, Report(
        shape=shape,
        dtype=y.dtype,
        plans=tuple(work.plans),
        flops=work.flops,
        requested_error=requested,
        expected_error=expected,
        bound=bound,
        covered=covered,
        unresolved=unresolved,
        rounding_floor=floor,
        reference_error=reference,
        reference_flops=limit,
    )


def resolves(gram: Tensor, shape: tuple[int, int], *, error: float) -> bool:
    """Whether rounding the entries to the dtype of ``gram`` leaves the singular vectors good to ``error``.

    Args:
        gram: the Gram matrix, in the dtype in question.
        shape: of the matrix.
        error: requested polar error.
    """
    spectrum = measure_spectrum(gram)
    noise = rounding_noise(frobenius=spectrum.frobenius, shape=shape, roundoff=roundoff(gram.dtype))
    floor = resolution(CENTERS * spectrum.upper, noise=noise).floor(spectrum.mass(EDGES))
    return floor <= CHOICE_MARGIN * error


def reference_flops(shape: tuple[int, int]) -> int:
    """FLOPs of torch.optim.Muon's five plain iterations on an (m, n) matrix.

    >>> reference_flops((512, 2048)) // 512**3 // 2
    45
    """
    return plain_flops(JORDAN, *shape)


def _is_hard(work: _Work, threshold: float) -> bool:
    """Whether more than ``threshold`` of the spectrum is too small to be told apart, but might be."""
    spectrum = work.spectrum
    # Once noise itself is as large as the values to be told apart, growing them further separates nothing.
    if spectrum.smallest >= HARD_VALUE * spectrum.upper or work.noise >= HARD_VALUE * spectrum.upper / 2:
        return False
    return float(spectrum.fraction_below(np.array([HARD_VALUE]))[0]) > threshold


def _grow(work: _Work, shape: tuple[int, int], *, threshold: float, error: float | None) -> None:
    """Growing iterations while the spectrum is hard to see."""
    for _ in range(1 if error is None else MAX_GROWTHS):
        if not _is_hard(work, threshold):
            return
        choose = partial(_growth, shape=shape, unit=roundoff(work.y.dtype), blocks=work.blocks)
        work.run(choose(work.spectrum), choose)
        work.measure()


def _growth(spectrum: Spectrum, *, shape: tuple[int, int], unit: float, blocks: bool) -> Plan:
    spread = min((s for s in SPREADS if s >= spectrum.spread / spectrum.upper**2), default=1.0)
    restarts = (1,) if plain_is_cheaper(shape) else growth_restarts(unit, spread)
    return Plan(
        schedule=GROWTH,
        restarts=restarts,
        scale=spectrum.upper,
        flops=gram_flops(GROWTH, *shape, restarts=restarts, blocks=blocks),
        expected_error=1.0,
        worst_error=1.0,
        covered=1.0,
    )


@lru_cache(maxsize=64)
def growth_restarts(unit: float, spread: float) -> tuple[int, ...]:
    """Where the growing iterations restart."""
    assert GROWTH.lower is not None
    at = CENTERS[GROWTH.lower <= CENTERS]
    return derive_restarts(GROWTH, at, roundoff=unit, spread=spread).restarts


def _check(work: _Work) -> tuple[float, float]:
    """Estimate and certified bound of the iterate's polar error to its own factor, from its Gram matrix.

    |1 − s| = |1 − s²|/(1 + s) ≤ |1 − s²| for s ≥ 0, so ‖P Pᵀ − I‖_F/√r bounds it. The estimate divides each
    node's share of the defect by 1 + s, s taken at the left end of the node's cell; what the nodes do not
    explain, a few values that Lanczos has not found, counts in full.
    """
    gram = work.gram.to(torch.float32, copy=True)
    gram.diagonal().sub_(1.0)
    defect = float(torch.linalg.vector_norm(gram)) / gram.shape[0] ** 0.5
    spectrum = work.spectrum
    s = spectrum.low + np.linspace(0.0, 1.0, 17)[:, None] * (spectrum.high - spectrum.low)
    shares = spectrum.weights * ((1 - s * s) ** 2).mean(axis=0)
    explained = float(shares.sum())
    estimate = float(np.sum(shares / (1 + spectrum.low) ** 2)) * min(1.0, defect**2 / max(explained, 1e-300))
    return min(float(np.sqrt(estimate + max(defect**2 - explained, 0.0))), defect), defect


def _merge(first: Spectrum, grown: Spectrum) -> np.ndarray:
    """Mass per cell before growing: small values as seen after it, the rest as seen before."""
    before = first.fraction_below(EDGES)
    small = EDGES <= GROWTH_MONOTONE
    limit = before[small][-1]
    after = grown.fraction_below(GROWTH.apply(EDGES[small]) / grown.upper)
    # Large values too may land low after growing; no more than the fraction known to be small is taken as
    # small.
    before[small] = np.minimum(after, limit)
    before[0] = 0.0
    return np.diff(np.maximum.accumulate(before))
