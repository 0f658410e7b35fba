"""Processor classes: what a device multiplies fast, and the sizes from which each way of making a polar factor pays.

The class follows from capabilities alone, never from a stopwatch, so that the same machine always decides alike.
"""

import os
import platform
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from muonwire.errors import UsageError

# What imitates or overrides: oneDNN's own limit, and ours for tests and for machines that are wrongly recognized.
ONEDNN_LIMIT = "ONEDNN_MAX_CPU_ISA"
OVERRIDE = "MUONWIRE_PROCESSOR"
# oneDNN's names of instruction sets below those that it would use for fast 16-bit products, and the class that they leave.
_LIMITED = {
    "SSE41": "generic",
    "AVX": "generic",
    "AVX2": "avx2",
    "AVX2_VNNI": "avx2",
    "AVX2_VNNI_2": "avx2",
    "AVX512_CORE": "avx512",
    "AVX512_CORE_VNNI": "avx512",
    "AVX512_CORE_BF16": "avx512_bf16",
    "AVX512_CORE_FP16": "avx512_bf16",
}


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A class of processors, and what follows from it. Sizes are of an m×n matrix with r = min(m, n), s = max(m, n).

    Args:
        name: of the class.
        dtype: of the products: the fastest of bfloat16, float16 and float32.
        has: what makes a device belong to the class.
        measured: on what the sizes were measured; empty where they are those of the nearest class that was.
        smallest_half: multiply-adds of a Gram matrix (r² s, over a whole stack) under which Polar Express in 16 bits takes longer
            than a Halley step and a quintic in float32.
        measured_wide: r from which measuring the spectrum saves more than it costs, where s > 1.5 r.
        measured_square: the same where s ≤ 1.5 r. In 16 bits no larger than 256: on large matrices of low rank Polar Express is
            worse than torch.optim.Muon's steps.
        stacked_wide: r² s up to which several matrices of one shape are faster as one stack, where s > 1.5 r.
        stacked_square: the same where s ≤ 1.5 r.
    """

    name: str
    dtype: torch.dtype
    has: str
    measured: str
    smallest_half: float
    measured_wide: int
    measured_square: int
    stacked_wide: float
    stacked_square: float

    def dtype_of(self, shape: tuple[int, int], *, count: int = 1) -> torch.dtype:
        """Dtype of the products for a stack of ``count`` matrices of ``shape``.

        >>> AVX2.dtype_of((512, 2048))
        torch.float32
        """
        short, long = sorted(shape)
        return self.dtype if count * short * short * long >= self.smallest_half else torch.float32

    def measures(self, shape: tuple[int, int]) -> bool:
        """Whether one matrix of ``shape`` has its spectrum measured."""
        short, long = sorted(shape)
        return short >= (self.measured_square if 2 * long <= 3 * short else self.measured_wide)

    def stacks(self, shape: tuple[int, int]) -> bool:
        """Whether several matrices of ``shape`` are iterated as one stack."""
        short, long = sorted(shape)
        limit = self.stacked_square if 2 * long <= 3 * short else self.stacked_wide
        return short * short * long <= limit


NEVER = 1 << 30
# `muonwire bench processor` measures the row of the processor that it runs on, and prints it.
AVX2 = Processor(
    name="avx2",
    dtype=torch.float32,
    has="AVX2",
    measured="two cores of an Intel Xeon that ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS limit to AVX2",
    smallest_half=0.0,
    measured_wide=256,
    measured_square=NEVER,
    stacked_wide=3e7,
    stacked_square=3e7,
)
AVX512 = replace(
    AVX2,
    name="avx512",
    has="AVX-512 without bfloat16 products",
    measured="two cores of an Intel Xeon that ONEDNN_MAX_CPU_ISA limits to AVX512_CORE",
)
# Processors of this class multiply in bfloat16 three to four times as fast as in float32. One with AMX on which oneDNN is limited
# to AVX512-BF16 takes 1.7 times as long instead, and says nothing about this class.
AVX512_BF16 = replace(
    AVX2, name="avx512_bf16", dtype=torch.bfloat16, has="AVX512-BF16 without AMX",
    measured="two cores of an AMD EPYC with AVX512-BF16", smallest_half=4.1e6,
    measured_wide=160, measured_square=256, stacked_wide=1.6e7, stacked_square=3.3e7,
)  # fmt: skip
AMX = replace(
    AVX512_BF16, name="amx", has="AMX-BF16",
    measured="two cores of an Intel Xeon with AMX", smallest_half=1.6e7,
    measured_wide=192, stacked_wide=2.9e7, stacked_square=1.4e8,
)  # fmt: skip
GENERIC = replace(AVX2, name="generic", has="none of the others", measured="")
ARM = replace(AVX2, name="arm", has="Arm without bfloat16 products", measured="")
ARM_BF16 = replace(AMX, name="arm_bf16", has="Arm with bfloat16 products", measured="")
MPS = replace(GENERIC, name="mps", has="Apple's Metal")
GPU = replace(GENERIC, name="gpu", has="a GPU with neither bfloat16 nor float16 tensor cores")
GPU_FP16 = replace(GPU, name="gpu_fp16", dtype=torch.float16, has="CUDA compute capability 7")
GPU_BF16 = replace(
    GPU,
    name="gpu_bf16",
    dtype=torch.bfloat16,
    has="CUDA compute capability 8 or more, or another accelerator with bfloat16",
)
# The slowest first: of several classes the first one decides for all, since it is its replica that the others wait for.
PROCESSORS = {
    p.name: p for p in (GENERIC, AVX2, ARM, AVX512, AVX512_BF16, ARM_BF16, AMX, MPS, GPU, GPU_FP16, GPU_BF16)
}

_override: list[Processor | None] = [None]


def find_processor(device: torch.device) -> Processor:
    """The class of ``device``: what ``set_processor`` or the variable MUONWIRE_PROCESSOR says, else what it can do.

    Args:
        device: where.

    Raises:
        UsageError: the variable names no class.

    >>> set_processor("avx2")
    >>> find_processor(torch.device("cpu")).dtype
    torch.float32
    >>> set_processor(None)
    """
    return _override[0] or _recognized(device)


def named_processor(name: str) -> Processor:
    """The class of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PROCESSORS:
        raise UsageError(f"processor: {name!r} is no class; allowed are {', '.join(PROCESSORS)}")
    return PROCESSORS[name]


def set_processor(name: str | None) -> None:
    """Take every device of this process for one of class ``name``; None goes back to what it can do.

    Args:
        name: of a class.

    Raises:
        UsageError: there is no such class.
    """
    _override[0] = None if name is None else named_processor(name)


def slowest(names: list[str]) -> Processor:
    """The class that decides where replicas of the classes ``names`` must multiply alike.

    Raises:
        UsageError: a name is no class.

    >>> slowest(["amx", "avx2"]).name
    'avx2'
    """
    order = list(PROCESSORS)
    return min((named_processor(n) for n in names), key=lambda p: order.index(p.name))


@lru_cache(maxsize=16)
def _recognized(device: torch.device) -> Processor:
    named = os.environ.get(OVERRIDE)
    if named:
        return named_processor(named)
    if device.type == "cpu":
        return _cpu(os.environ.get(ONEDNN_LIMIT, "").upper())
    if device.type == "cuda":
        return _cuda(torch.cuda.get_device_capability(device))
    if device.type == "xpu":
        return GPU_BF16 if torch.xpu.is_bf16_supported() else GPU
    return MPS if device.type == "mps" else GENERIC


def _cuda(capability: tuple[int, int]) -> Processor:
    if torch.version.hip is not None:
        return GPU_BF16 if torch.cuda.is_bf16_supported(including_emulation=False) else GPU
    return GPU_BF16 if capability >= (8, 0) else GPU_FP16 if capability >= (7, 0) else GPU


def _cpu(limit: str) -> Processor:
    """By what the processor has, oneDNN is built for and the system lets it use."""
    if not torch._C._has_mkldnn:
        return GENERIC
    found = _arm() if platform.machine().lower() in ("arm64", "aarch64") else _x86()
    return slowest([found.name, _LIMITED.get(limit, found.name)])


def _arm() -> Processor:
    return ARM_BF16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ARM


def _x86() -> Processor:
    widest = torch.backends.cpu.get_cpu_capability()
    if widest.startswith("AVX512"):
        # The tiles need the system's permission, which a virtual machine may withhold.
        if torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
            return AMX
        return AVX512_BF16 if torch.cpu._is_avx512_bf16_supported() else AVX512
    return AVX2 if widest == "AVX2" else GENERIC
