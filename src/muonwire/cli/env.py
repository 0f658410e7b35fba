"""`muonwire env`: what a bug report needs to know of this machine, on one screen."""

import json
import os
import platform
import socket
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from muonwire import __version__
from muonwire.bench.break_even import measure_rates
from muonwire.cli.arguments import command
from muonwire.errors import ExchangeError
from muonwire.polar import find_processor
from muonwire.transport.interfaces import interface_to, interfaces

PACKAGES = (
    *("numpy", "constriction", "transformers", "tokenizers", "safetensors", "tyro", "rich", "polars"),
    *("altair", "accelerate", "lightning"),
)
# Variables that change results, speed or the way to the other replicas.
VARIABLES = (
    *("OMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_CPU_CAPABILITY", "MUONWIRE_", "CUDA_VISIBLE_DEVICES"),
    *("GLOO_", "NCCL_", "TP_SOCKET_IFNAME", "MASTER_", "RANK", "WORLD_SIZE"),
)
RATE_SIZE = 256
WIDTH = 80
# SIOCGIFADDR of Linux: an interface's IPv4 address.
# Any address outside: connecting a UDP socket sends nothing, but shows the interface that routes there.
_OUTSIDE = ("192.0.2.1", 9)


@dataclass(frozen=True, kw_only=True)
class Env:
    """Arguments of `muonwire env`.

    Args:
        json: print JSON instead of the screen.
    """

    json: bool = False


@command(
    Env,
    name="env",
    about="Versions, processor, dtype, backends and network of this machine, to be pasted into a bug report.",
    examples=("muonwire env", "muonwire env --json > env.json"),
)
def main(options: Env) -> int:
    """Print what a bug report needs; returns the exit code."""
    found = describe()
    print(json.dumps(found, indent=1) if options.json else as_text(found))
    return 0


def describe() -> dict[str, Any]:
    """Everything that the command shows, by section and name."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    processor = find_processor(device)
    rates = measure_rates(device, sizes=(RATE_SIZE,))
    return {
        "versions": {
            "muonwire": __version__,
            "python": platform.python_version(),
            "torch": f"{torch.__version__} ({_build()})",
            "system": platform.platform(),
        },
        "processor": {
            "name": processor_name(),
            "class": f"{processor.name} ({processor.has})",
            f"products of {RATE_SIZE}²": ", ".join(
                f"{str(dtype)[6:]} {speeds[RATE_SIZE]:.3g} GF/s" for dtype, speeds in rates.gflops.items()
            ),
            "polar factors": f"in {str(processor.dtype)[6:]}, unless a recipe's option dtype says otherwise",
            "threads": f"{torch.get_num_threads()} of torch, {_usable_cores()} of {os.cpu_count()} cores usable",
            "memory": _memory(),
            "accelerators": _accelerators(),
        },
        "replicas": {
            "backends": ", ".join(_backends()) or "none: this torch has no distributed package",
            "torchft": version_of("torchft"),
            "interfaces": interfaces_text() or "unknown",
            "would be used": used_interface(),
        },
        "packages": {name: version_of(name) for name in PACKAGES},
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
    }


def as_text(found: dict[str, Any]) -> str:
    """The sections, no line wider than 80 columns.

    Args:
        found: by ``describe``.
    """
    lines: list[str] = []
    for section, entries in found.items():
        lines.append(section)
        if section == "packages":
            lines += _wrapped("", ", ".join(f"{name} {value}" for name, value in entries.items()), indent=2)
            continue
        width = max((len(name) for name in entries), default=0)
        for name, value in entries.items():
            lines += _wrapped(f"  {name.ljust(width)}  ", str(value), indent=width + 4)
        if not entries:
            lines.append("  none of those that change results or speed is set")
    return "\n".join(lines)


def _wrapped(label: str, text: str, *, indent: int) -> list[str]:
    from textwrap import wrap

    lines = wrap(text, WIDTH - indent, break_on_hyphens=False) or [""]
    return [(label or " " * indent) + lines[0], *(" " * indent + line for line in lines[1:])]


def _build() -> str:
    kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.version.hip:
        kind = f"ROCm {torch.version.hip}"
    libraries = {"MKL": torch._C.has_mkl, "oneDNN": torch._C._has_mkldnn}
    return ", ".join([kind, *(name for name, has in libraries.items() if has)])


def processor_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def _accelerators() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    found = torch.accelerator.current_accelerator(check_available=True)
    return str(found) if found else "none"


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    checks = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    return [name for name, available in checks.items() if available()]


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed".

    >>> version_of("no-such-package")
    'not installed'
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def interfaces_text() -> str:
    """Network interfaces, each with one of its addresses."""
    first = {i.name: i.address for i in reversed(interfaces())}
    return ", ".join(f"{name} {first.get(name, 'no address')}" for _, name in socket.if_nameindex())


def used_interface() -> str:
    """The interface over which gloo would reach the other replicas, and why."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        return f"{chosen}, which GLOO_SOCKET_IFNAME names"
    master = os.environ.get("MASTER_ADDR")
    target = (master, 9) if master else _OUTSIDE
    why = (
        f"it routes to MASTER_ADDR, {master}"
        if master
        else "it has the default route; MASTER_ADDR is not set"
    )
    try:
        return f"{interface_to(*target)}: {why}"
    except ExchangeError as error:
        return f"none: {master or 'the outside'} cannot be reached ({error.__cause__})"
