"""What a schedule is: odd polynomials that map every singular value, and their analysis."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muonwire.errors import UsageError
from muonwire.polar.minimax import evaluate, extrema

Step = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Coefficients of an iterative polar method, one tuple (c₀, c₁, …) per iteration.

    Iteration: X ← (c₀ I + c₁ A + c₂ A² + …) X with A = X Xᵀ, which maps each singular value x to
    c₀ x + c₁ x³ + c₂ x⁵ + …

    Args:
        name: how the command line and reports call it.
        coefficients: one tuple of two to four numbers per iteration: degrees 3, 5 and 7.
        source: where the figures were published or how they were derived.
        lower: the left end of the interval [lower, 1] that it was made for; None where it was made for none.

    Raises:
        UsageError: no iteration, or one of another degree or with a coefficient that is not finite.

    >>> quintic = Schedule(name="taylor", coefficients=((1.875, -1.25, 0.375),) * 5, source="Higham (2008)")
    >>> quintic(1.0), round(quintic.slope, 2), len(quintic)
    (1.0, 23.17, 5)
    """

    name: str
    coefficients: tuple[Step, ...]
    source: str
    lower: float | None = None

    def __post_init__(self) -> None:
        lengths = {len(step) for step in self.coefficients}
        if not self.coefficients or not lengths <= {2, 3, 4}:
            raise UsageError(
                f"Schedule: coefficients have {sorted(lengths)} numbers per iteration in "
                f"{len(self.coefficients)} iterations; it takes at least one iteration of two to four "
                "numbers, for degrees 3, 5 and 7"
            )
        if not all(np.isfinite(c) for step in self.coefficients for c in step):
            raise UsageError(f"Schedule: coefficients of {self.name!r} are not all finite")

    def __len__(self) -> int:
        return len(self.coefficients)

    def __call__(self, x: float) -> float:
        """Map one singular value through all iterations."""
        return float(self.apply(np.array([x]))[0])

    def apply(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Map singular values, of any shape, through all iterations."""
        for step in self.coefficients:
            x = evaluate(step, x)
        return x

    @property
    def slope(self) -> float:
        """Derivative at 0, ∏ c₀: how much the smallest singular values, and noise, grow."""
        return float(np.prod([step[0] for step in self.coefficients]))

    def range(self, lower: float, upper: float = 1.0) -> tuple[float, float]:
        """Smallest and largest value on [lower, upper]: every iteration's extrema and ends are followed.

        >>> Schedule(name="cubic", coefficients=((1.5, -0.5),), source="Higham (2008)").range(0.0, 1.0)
        (0.0, 1.0)
        """
        if not 0 <= lower <= upper:
            raise UsageError(f"Schedule.range: [{lower!r}, {upper!r}] is not an interval of [0, ∞)")
        low, high = lower, upper
        for step in self.coefficients:
            values = np.abs(evaluate(step, np.concatenate([[low, high], extrema(step, low, high)])))
            signed = evaluate(step, np.concatenate([[low, high], extrema(step, low, high)]))
            # Past a sign change the interval straddles 0; odd symmetry lets the rest go on with absolute
            # values.
            low = 0.0 if signed.min() < 0 < signed.max() else float(values.min())
            high = float(values.max())
        return low, high

    def worst_error(self, lower: float, upper: float = 1.0) -> float:
        """Largest |1 − p(x)| on [lower, upper]: bounds the polar error if all σ lie there.

        >>> cubic = Schedule(name="cubic", coefficients=((1.5, -0.5),) * 5, source="Higham (2008)")
        >>> round(cubic.worst_error(0.5), 6)
        1e-06
        """
        low, high = self.range(lower, upper)
        return max(1 - low, high - 1)

    def stable_interval(self) -> float:
        """Largest u such that every iterate of every x in [0, u] stays within [0, 2 √3], found by bisection.

        Beyond it a singular value that was scaled too large grows or changes sign instead of nearing 1.

        >>> cubic = Schedule(name="cubic", coefficients=((1.5, -0.5),) * 30, source="Higham (2008)")
        >>> round(cubic.stable_interval(), 3)
        1.732
        """
        low, high = 0.0, 8.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self._stays(middle) else (low, middle)
        return low

    def _stays(self, upper: float) -> bool:
        for step in self.coefficients:
            values = evaluate(step, np.concatenate([[upper], extrema(step, 0.0, upper)]))
            if values.min() < 0 or values.max() > 2 * np.sqrt(3):
                return False
            upper = float(values.max())
        return True
