"""The published schedules by name, and the solvers that make others."""

from muonwire.errors import UsageError
from muonwire.polar.composed import cans, mixed, polar_express, relaxed_cubic
from muonwire.polar.schedule import Schedule

__all__ = [
    "CANS",
    "JORDAN",
    "POLAR_EXPRESS",
    "RELAXED_CUBIC",
    "SCHEDULES",
    "TAYLOR_CUBIC",
    "TAYLOR_QUINTIC",
    "TUNED",
    "Schedule",
    "cans",
    "find",
    "mixed",
    "polar_express",
    "relaxed_cubic",
]

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
    lower=1e-3,
)
TAYLOR_CUBIC = Schedule(
    name="taylor_cubic",
    coefficients=((1.5, -0.5),) * 5,
    source="Higham, Functions of Matrices (2008), section 5.3: Newton-Schulz",
)
TAYLOR_QUINTIC = Schedule(
    name="taylor_quintic",
    coefficients=((1.875, -1.25, 0.375),) * 5,
    source="Higham, Functions of Matrices (2008), section 5.4: the Padé family's [2/0] member",
)
CANS = Schedule(
    name="cans",
    coefficients=(
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    source="arXiv 2506.10935; the minimax composition for lower=1e-3",
    lower=1e-3,
)
RELAXED_CUBIC = Schedule(
    name="relaxed_cubic",
    coefficients=(
        (3.3656576, -3.3420992),
        (2.5744352, -1.4957376),
        (2.5368962, -1.4312570),
        (2.4418906, -1.2764040),
        (2.2230472, -0.9630650),
    ),
    source="arXiv 2606.00371, cubic5; relaxed_cubic(lower=0.007, steps=5, overshoot=0.3)",
    lower=7e-3,
)

SCHEDULES = {
    s.name: s for s in (JORDAN, TUNED, POLAR_EXPRESS, TAYLOR_CUBIC, TAYLOR_QUINTIC, CANS, RELAXED_CUBIC)
}


def find(schedule: Schedule | str | None, *, operation: str) -> Schedule:
    """The schedule itself or the one of that name; ``polar_express`` for None.

    Args:
        schedule: a schedule, a name of ``SCHEDULES``, or None.
        operation: who asks, for the message.

    Raises:
        UsageError: no schedule has that name.

    >>> find("jordan", operation="polar").slope > 400
    True
    """
    if schedule is None:
        return POLAR_EXPRESS
    if isinstance(schedule, Schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise UsageError(
            f"{operation}: schedule is {schedule!r}; allowed are {', '.join(SCHEDULES)}, or a Schedule, "
            "such as schedules.polar_express(lower=0.01, steps=4)"
        )
    return SCHEDULES[schedule]
