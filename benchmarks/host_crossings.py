"""How often one step of an optimizer lets bytes cross from the device to the host, and how many, on a stand-in that counts them.

`python -m benchmarks.host_crossings --out evidence/host_crossings.json --label after` measures codecs, each in an exchange of two
replicas with feedback, and recipes. What the file holds under other labels stays.
"""

import argparse
import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.standin import DEVICE, StandIn
from torch import nn

from muonwire import codec, recipes
from muonwire.stages import EF14, Context, Exchange, MatrixLayout
from muonwire.transport import run_threads

SHAPES = ((256, 512), (128, 256), (512,))
CODECS = (
    "float32",
    "bfloat16",
    "sign(scale=tensor)",
    "sign(scale=row)",
    "sign(scale=shared)",
    "ternary(scale=row)",
    "int(bits=4, scale=row)",
    "codebook(bits=2, scale=row)",
    "topk(density=0.05) | sign(scale=tensor)",
    "topk(density=0.05) | bfloat16",
    "randomk(density=0.05) | bfloat16",
    "nm(n=2, m=4) | sign(scale=row)",
    "toprows(density=0.1) | bfloat16",
    "dct(chunk=64) | topk(k=32) | sign(scale=none)",
    "hadamard | sign(scale=chunk)",
    "lowrank(rank=4) | bfloat16",
)
RECIPES: dict[str, dict[str, Any]] = {
    "muon": {},
    "adamw": {},
    "one_bit_muon": {"interval": 2},
    "local_muon": {"interval": 2},
    "sparseloco": {"interval": 2},
    "distro": {},
    "demo": {},
    "ef14_muon": {},
    "ef21_muon": {},
    "approach_b": {},
    "powersgd_muon": {},
    "dion": {},
}
REPLICAS = 2


def on_two_replicas(run: Callable[[Any, StandIn], dict[str, Any]]) -> dict[str, Any]:
    """What ``run(transport, device)`` returns on the first of two replicas, each with a stand-in device of its own."""
    found: dict[int, dict[str, Any]] = {}

    def worker(rank: int, make: Callable[[], Any]) -> None:
        with StandIn() as device:
            transport = make()
            # Each replica decodes for itself, as those on hosts of their own do.
            transport.once = lambda key, compute: compute()
            found[rank] = run(transport, device)

    run_threads(worker, replicas=REPLICAS)
    return found[0]


def counted(device: StandIn) -> dict[str, Any]:
    """The crossings since they were last forgotten."""
    return {
        "waits": device.to_host.count,
        "waits_to_device": device.blocking,
        "to_host_bytes": device.to_host.num_bytes,
        "to_device_bytes": device.to_device.num_bytes,
        "by_operation": dict(sorted(device.to_host.by_operation.items())),
    }


def measure_codec(text: str) -> dict[str, Any]:
    """One round of an exchange with this codec and EF14's feedback."""
    stage = Exchange(codec=codec.parse(text), feedback=EF14())

    def run(transport: Any, device: StandIn) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(transport.rank)
        params = [torch.zeros(shape).to(DEVICE) for shape in SHAPES]
        states = [stage.init(p) for p in params]
        for step in (1, 2):
            updates = [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]
            context = Context(
                lr=0.1, step=step, transport=transport, layouts=[MatrixLayout() for _ in SHAPES]
            )
            device.forget()
            stage.apply(updates, params, states, context)
        return counted(device)

    found = on_two_replicas(run)
    entries = sum(torch.Size(shape).numel() for shape in SHAPES)
    return {**found, "entries": entries, "payload_bytes": stage.codec.estimate_bytes(*SHAPES)}


def model(device: torch.device = DEVICE) -> nn.Module:
    """A small model on the device."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 256))
    for module in made:
        for name, param in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(param.detach().to(device)))
    return made


def measure_recipe(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two steps after two others: with local steps one alone, and one that synchronizes."""

    def run(transport: Any, device: StandIn) -> dict[str, Any]:
        with building:
            trained = model()
            optimizer = recipes.build(name, trained, lr=0.01, transport=transport, **options)
        generator = torch.Generator().manual_seed(transport.rank)
        steps = []
        for _ in range(4 if "interval" in options else 2):
            for param in trained.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(DEVICE)
            device.forget()
            optimizer.step()
            steps.append(counted(device))
        params = sum(p.numel() for p in trained.parameters())
        alone = {"alone": steps[-2]} if "interval" in options else {}
        return {"parameters": params, "exchanging": steps[-1], **alone}

    return on_two_replicas(run)


building = threading.Lock()


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--label", default="after")
    parser.add_argument("--codecs", nargs="*", default=list(CODECS))
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    chosen = parser.parse_args()
    found = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
    found[chosen.label] = {
        "codecs": {text: tried(partial(measure_codec, text)) for text in chosen.codecs},
        "recipes": {name: tried(partial(measure_recipe, name, RECIPES[name])) for name in chosen.recipes},
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    for kind, measured in found[chosen.label].items():
        for name, figures in measured.items():
            print(kind, name, json.dumps(figures))


def tried(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measures, or why it cannot: what a stand-in refuses, an accelerator would refuse too."""
    try:
        return measure()
    except (RuntimeError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}


if __name__ == "__main__":
    main()
