"""Schedules: the per-iteration coefficients (a, b, c) of the odd polynomial p(x) = a x + b x³ + c x⁵."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Coefficients of an iterative polar method, one (a, b, c) per iteration.

    Iteration: X ← a X + (b A + c A²) X with A = X Xᵀ, which maps each singular value x to a x + b x³ + c x⁵.

    Args:
        name: how the command line and reports call it.
        coefficients: one triple per iteration.
        source: where the figures were published.
    """

    name: str
    coefficients: tuple[tuple[float, float, float], ...]
    source: str

    def __call__(self, x: float) -> float:
        """Map one singular value through all iterations.

        >>> round(TAYLOR_CUBIC(1.0), 6)
        1.0
        """
        for a, b, c in self.coefficients:
            square = x * x
            x = x * (a + square * (b + square * c))
        return x


JORDAN = Schedule(
    name="jordan",
    coefficients=((3.4445, -4.7750, 2.0315),) * 5,
    source="Keller Jordan's Muon (2024); the default of torch.optim.Muon",
)
TUNED = Schedule(
    name="tuned",
    coefficients=(
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    source="modded-nanogpt record 2025-02-14_OptCoeffs",
)
POLAR_EXPRESS = Schedule(
    name="polar_express",
    coefficients=(
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    source="arXiv 2505.16932, l=1e-3, 5 steps, cushion 0.02, safety 1.02, as used by modded-nanogpt and dion",
)
TAYLOR_CUBIC = Schedule(
    name="taylor_cubic",
    coefficients=((1.5, -0.5, 0.0),) * 5,
    source="Higham, Functions of Matrices (2008), section 5.3: Newton-Schulz",
)
TAYLOR_QUINTIC = Schedule(
    name="taylor_quintic",
    coefficients=((1.875, -1.25, 0.375),) * 5,
    source="Higham, Functions of Matrices (2008), section 5.4: the Padé family's [2/0] member",
)

SCHEDULES = {s.name: s for s in (JORDAN, TUNED, POLAR_EXPRESS, TAYLOR_CUBIC, TAYLOR_QUINTIC)}
