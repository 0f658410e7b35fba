"""What the CPU cannot tell: codecs and recipes on a GPU against the CPU's, their speed, and how often the host waits.

`make gpu` runs ``python -m benchmarks.gpu --out evidence/gpu.json`` on the GPU that is there; without one it says so and exits
with 2. docs/gpu.md shows what it found. ``--device cpu --quick`` tries the script itself.
"""

import argparse
import json
import platform
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.host_crossings import CODECS
from torch import Tensor, nn

from muonwire import codec, recipes
from muonwire.bench.polar import torch_muon
from muonwire.lab import Row, Setting
from muonwire.lab.claims.integration.precision_by_device import measure_here
from muonwire.polar import polar
from muonwire.polar.quality import exact_factor, polar_error
from muonwire.transport import check_replicas, run_threads

# Two scales that differ by a rounding to bfloat16 differ by 2⁻⁷ at most.
SCALES = 2.0**-7
# Recipes, and how far the weights' change may be from the CPU's: float32 sums in another order; what a scale's rounding moves,
# and feedback carries on; and where polar factors are made by another method on a GPU, the error of both, 0.15 at most each.
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "adamw": ({}, 1e-3),
    "local_adamw": ({"interval": 2}, 4 * SCALES),
    "muon": ({}, 0.3),
    "one_bit_muon": ({"interval": 2}, 0.3),
    "powersgd_muon": ({}, 0.3),
}
REPLICAS, STEPS = 2, 4
# Of larger matrices no error is told, whose exact factor takes minutes.
LARGEST_SVD = 1024


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def median_s(run: Callable[[], Any], device: torch.device, *, rounds: int) -> float:
    """Of several turns after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def difference(one: Tensor, other: Tensor) -> float:
    """‖a − b‖ / ‖b‖ on the CPU."""
    a, b = one.cpu().double(), other.cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def measure_codec(text: str, device: torch.device, *, size: int, rounds: int) -> dict[str, Any]:
    """One codec: the same payload must decode alike, and what is encoded must lose no more than on the CPU."""
    chosen = codec.parse(text)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).pow(3)
    there = x.to(device)
    here_body = chosen.encode_body(x, seed=1).body
    encoded = chosen.encode_body(there, seed=1)
    body = encoded.body
    decoded = chosen.decode_body(here_body, (size, size), device=device)
    on_cpu = chosen.decode_body(here_body, (size, size))
    losses = [difference(d, x) for d in (encoded.decoded, on_cpu)]
    # A product of matrices is a sum in another order; without one each value is the same on all machines.
    basis = text.startswith("dct")
    own = difference(encoded.decoded, chosen.decode_body(body, (size, size), device=device))
    alike = difference(decoded, on_cpu)
    # Of a number of replicas whose reciprocal is not exact.
    three = [here_body, chosen.encode_body(2 * x, seed=1).body, chosen.encode_body(-3 * x, seed=1).body]
    means = [chosen.mean_bodies(three, (size, size), device=d) for d in (device, torch.device("cpu"))]
    means_alike = difference(*means)
    gigabytes = x.numel() * 4 / 1e9
    return {
        "same_bytes": body == here_body,
        "own_difference": own,
        "decoded_difference": alike,
        "mean_difference": means_alike,
        "loss": losses[0],
        "loss_on_cpu": losses[1],
        "holds": own == 0
        and max(alike, means_alike) <= (1e-4 if basis else 0.0)
        and losses[0] <= losses[1] + SCALES,
        "encode_gb_s": gigabytes
        / median_s(lambda: chosen.encode_body(there, seed=1).body, device, rounds=rounds),
        "decode_gb_s": gigabytes
        / median_s(lambda: chosen.decode_body(body, (size, size), device=device), device, rounds=rounds),
    }


def measure_arithmetic(device: torch.device) -> dict[str, Any]:
    """Whether what moves shared weights has the CPU's bits: products and sums of entries, in one rounding or in two as there."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 100_003, generator=generator)
    steps: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda x, y: x.add(y, alpha=-0.9),
        "lerp": lambda x, y: x.lerp(y, 0.05).lerp(y, 0.95),
        "mul": lambda x, y: x.mul(0.7).add_(y),
    }
    same = {
        name: torch.equal(run(a.to(device), b.to(device)).cpu(), run(a, b)) for name, run in steps.items()
    }
    return {**same, "holds": all(same.values())}


def model(width: int, device: torch.device) -> nn.Module:
    """An embedding and two layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(256, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    ).to(device)


def trained(name: str, options: dict[str, Any], device: torch.device, *, width: int) -> dict[str, Any]:
    """The change of the weights by a few steps of two replicas, whether these are alike, and the waits of the last step."""
    found: dict[int, dict[str, Any]] = {}

    def worker(rank: int, make: Callable[[], Any]) -> None:
        transport = make()
        built = model(width, device)
        before = [p.detach().cpu().clone() for p in built.parameters()]
        optimizer = recipes.build(name, built, lr=0.01, transport=transport, **options)
        generator = torch.Generator().manual_seed(rank)
        waits: int | None = 0
        for step in range(STEPS):
            for param in built.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(device)
            if step == STEPS - 1 and rank == 0:
                waits = count_waits(optimizer.step, device)
            else:
                optimizer.step()
        try:
            alike = bool(check_replicas(built, transport))
        except RuntimeError:
            alike = False
        change = torch.cat(
            [(p.detach().cpu() - b).flatten() for p, b in zip(built.parameters(), before, strict=True)]
        )
        found[rank] = {"change": change, "replicas_alike": alike, "waits": waits}

    run_threads(worker, replicas=REPLICAS)
    return found[0]


def count_waits(run: Callable[[], Any], device: torch.device) -> int | None:
    """How often the host waits for a CUDA device within ``run``, by torch's own debug mode; None on other devices.

    Replicas are threads that take turns: what another one does meanwhile does not count.
    """
    if device.type != "cuda":
        run()
        return None
    own, seen = threading.get_ident(), []

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if threading.get_ident() == own and "synchronizing CUDA operation" in str(message):
            seen.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return len(seen)


def measure_recipe(name: str, device: torch.device, *, width: int) -> dict[str, Any]:
    """One recipe on the device and on the CPU."""
    options, allowed = RECIPES[name]
    there = trained(name, options, device, width=width)
    here = trained(name, options, torch.device("cpu"), width=width)
    apart = difference(there["change"], here["change"])
    return {
        "difference": apart,
        "allowed": allowed,
        "replicas_alike": there["replicas_alike"],
        "waits": there["waits"],
        "holds": apart <= allowed and there["replicas_alike"],
    }


def measure_muon(device: torch.device, *, width: int, layers: int, rounds: int) -> dict[str, Any]:
    """A step of ours and of torch.optim.Muon, of one replica."""

    def matrices() -> nn.Module:
        torch.manual_seed(0)
        shapes = [(width, width), (4 * width, width)] * layers
        built = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in shapes]).to(device)
        for param in built.parameters():
            param.grad = torch.randn_like(param)
        return built

    ours, theirs = matrices(), matrices()
    times = [
        median_s(optimizer.step, device, rounds=rounds)
        for optimizer in (
            recipes.muon(ours, lr=0.01),
            torch.optim.Muon(theirs.parameters(), lr=0.01),
        )
    ]
    return {
        "ours_ms": 1e3 * times[0],
        "torch_ms": 1e3 * times[1],
        "matrices": f"{layers} of {width} × {width} and as many of {4 * width} × {width}",
    }


def measure_polar(
    device: torch.device, *, shapes: Sequence[tuple[int, int]], rounds: int
) -> dict[str, dict[str, float | None]]:
    """A polar factor as ``polar`` makes it and by torch.optim.Muon's own function, of Gaussian matrices."""
    found = {}
    for m, n in shapes:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, n, generator=generator).to(device)
        # On the host, since not all devices have float64.
        exact = exact_factor(x.cpu()) if min(m, n) <= LARGEST_SVD else None
        ways: dict[str, Callable[[], Tensor]] = {"ours": partial(polar, x), "torch": partial(torch_muon, x)}
        row: dict[str, float | None] = {}
        for name, way in ways.items():
            row[f"{name}_error"] = None if exact is None else polar_error(way().cpu(), x.cpu(), exact=exact)
            row[f"{name}_ms"] = 1e3 * median_s(way, device, rounds=rounds)
        found[f"{m} × {n}"] = row
    return found


def measure_precision(device: torch.device, *, shapes: Sequence[tuple[int, int]], quick: bool) -> list[Row]:
    """The rows of the claim integration.6, polar factors in each dtype at equal error; of CUDA's devices, and the CPU to try it."""
    if device.type not in ("cuda", "cpu"):
        return []
    setting = Setting(seed=0, quick=quick, folder=Path())
    return [row for row in measure_here(setting, limited="", shapes=shapes) if row.get("ms")]


def tried(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it finds; where it fails what it says, so that the others are made all the same."""
    try:
        return check()
    except Exception as error:
        return {"holds": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def measure(device: torch.device, *, quick: bool) -> dict[str, Any]:
    """All of it."""
    size, width, layers, rounds = (64, 16, 1, 1) if quick else (4096, 256, 8, 9)
    shapes = ((16, 32),) if quick else ((256, 1024), (1024, 1024), (1024, 4096), (4096, 4096))
    found: dict[str, Any] = {
        "device": {
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "codecs": {
            text: tried(partial(measure_codec, text, device, size=size, rounds=rounds)) for text in CODECS
        },
        "arithmetic": tried(partial(measure_arithmetic, device)),
        "recipes": {name: tried(partial(measure_recipe, name, device, width=width)) for name in RECIPES},
        "muon": measure_muon(device, width=width if quick else 1024, layers=layers, rounds=rounds),
        "polar": measure_polar(device, shapes=shapes, rounds=rounds),
        "precision": measure_precision(
            device, shapes=shapes if quick else ((256, 1024), (1024, 4096), (2048, 2048)), quick=quick
        ),
    }
    checks = [e["holds"] for kind in ("codecs", "recipes") for e in found[kind].values()]
    checks.append(found["arithmetic"]["holds"])
    return {**found, "checks": len(checks), "passed": sum(checks)}


def main() -> int:
    """Measure, print, write; returns the exit code: 1 where a check fails, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", help="default: the accelerator that torch finds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes, one turn")
    chosen = parser.parse_args()
    if chosen.device is None and not torch.accelerator.is_available():
        print(
            "gpu: torch finds no GPU here, so nothing was measured and evidence/gpu.json is not written; run make gpu on a machine "
            "that has one, with the build of torch for it (--device cpu --quick tries the script)",
            file=sys.stderr,
        )
        return 2
    device = torch.device(chosen.device or torch.accelerator.current_accelerator() or "cpu")
    found = measure(device, quick=chosen.quick)
    print(json.dumps(found, indent=1))
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["passed"] == found["checks"] else 1


if __name__ == "__main__":
    sys.exit(main())
