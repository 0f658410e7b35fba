"""Which dtype the products run in: the fastest on this device that the requested error allows."""

import threading
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from muonwire.errors import UsageError

CANDIDATES = (torch.bfloat16, torch.float16, torch.float32)
SIZE = 256
NUM_REPEATS = 5
# A narrower dtype must be this much faster than float32, so that replicas on equal machines choose alike
# whatever else runs on them.
CLEARLY_FASTER = 1.3

_lock = threading.Lock()
_chosen: dict[str, torch.dtype] = {}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured speed of products on one device.

    Args:
        device: its type and index.
        gflops: dtype -> 10⁹ FLOPs per second for a 256×256 product.
    """

    device: str
    gflops: dict[torch.dtype, float]

    @property
    def fastest(self) -> torch.dtype:
        """bfloat16 or float16 where clearly faster than float32, bfloat16 where the two are close."""
        base = self.gflops[torch.float32]
        half, brain = self.gflops[torch.float16], self.gflops[torch.bfloat16]
        if max(half, brain) < CLEARLY_FASTER * base:
            return torch.float32
        # float16 has three more bits but five binary orders below 1; bfloat16 needs no care with range.
        return torch.float16 if half > CLEARLY_FASTER * brain else torch.bfloat16


@lru_cache(maxsize=16)
def measure_speed(device: torch.device) -> Speed:
    """Time a 256×256 product in each dtype, once per device and process.

    Args:
        device: where.

    >>> sorted(str(d) for d in measure_speed(torch.device("cpu")).gflops)
    ['torch.bfloat16', 'torch.float16', 'torch.float32']
    """
    gflops = {}
    for dtype in CANDIDATES:
        a = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
        seconds = []
        for _ in range(NUM_REPEATS + 1):
            _wait(device)
            start = time.perf_counter()
            torch.mm(a, a)
            _wait(device)
            seconds.append(time.perf_counter() - start)
        gflops[dtype] = 2 * SIZE**3 / min(seconds[1:]) / 1e9
    return Speed(device=str(device), gflops=gflops)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the products on ``device``: what ``set_product_dtype`` said, else the fastest as measured.

    Args:
        device: where.

    >>> set_product_dtype(torch.float32, device=torch.device("cpu"))
    >>> product_dtype(torch.device("cpu"))
    torch.float32
    >>> set_product_dtype(None, device=torch.device("cpu"))
    """
    key = str(device)
    with _lock:
        if key not in _chosen:
            _chosen[key] = measure_speed(device).fastest
        return _chosen[key]


def set_product_dtype(dtype: torch.dtype | None, *, device: torch.device) -> None:
    """Override the measurement for ``device``; None measures again on the next use.

    Replicas on unequal machines may measure differently, and must agree to stay bit-identical.

    Args:
        dtype: bfloat16, float16, float32, float64 or None.
        device: where.

    Raises:
        UsageError: another dtype.
    """
    if dtype is not None and dtype not in (*CANDIDATES, torch.float64):
        raise UsageError(
            f"set_product_dtype: dtype is {dtype}; allowed are bfloat16, float16, float32, float64, None"
        )
    with _lock:
        if dtype is None:
            _chosen.pop(str(device), None)
        else:
            _chosen[str(device)] = dtype
