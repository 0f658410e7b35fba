"""What torch.optim.Muon would do with a matrix of a given spectrum: the yardstick of the automatic choice."""

import numpy as np
from numpy.typing import NDArray

from muonwire.polar.plans import Resolution
from muonwire.polar.products import plain_flops
from muonwire.polar.schedules import JORDAN

Values = NDArray[np.float64]


def reference_flops(shape: tuple[int, int]) -> int:
    """FLOPs of torch.optim.Muon's five plain iterations on an (m, n) matrix.

    >>> reference_flops((512, 2048)) // 512**3 // 2
    45
    """
    return plain_flops(JORDAN, *shape)


def reference_error(values: Values, mass: Values, seen: Resolution, *, frobenius: float) -> float:
    """Polar error of torch.optim.Muon's result: rms of 1 − p(σ/‖X‖_F) over what the dtype resolves.

    Args:
        values: singular values.
        mass: fraction of the singular values at each.
        seen: what the dtype resolves of them.
        frobenius: ‖X‖_F.
    """
    return seen.error(mass, JORDAN.apply(values / frobenius))
