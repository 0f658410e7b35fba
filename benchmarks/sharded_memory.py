"""The peak memory of a process whose replica is two processes with sharded weights, against one whose replica is a process.

    python benchmarks/sharded_memory.py --out evidence/sharded_memory.json

Two replicas train a stack of residual bottlenecks, x + B gelu(A x), on a batch of two vectors: as two processes, and as 2 × 2
processes that `fully_shard` every block and the rest. Memory is what is resident of a process (VmHWM of /proc/self/status, set back
after the imports and the process group) above what is resident then, with malloc's threshold of mmap fixed, so that what is freed
is given back. The model is made on the meta device first, so that no process holds whole weights but in the unsharded run.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonwire import recipes
from muonwire.transport import ProcessGroupTransport, Transport, mesh_transport
from muonwire.transport.shards import local

ROOT = Path(__file__).parents[1]
REPLICAS, SHARDS = 2, 2
# What each recipe is given, and how many steps it takes: two synchronizations where steps are local.
RECIPES: dict[str, tuple[dict[str, Any], int]] = {"muon": ({}, 3), "one_bit_muon": ({"interval": 2}, 4)}


class Bottleneck(nn.Module):
    """x + B gelu(A x)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width) to the same."""
        result: Tensor = x + self.up(nn.functional.gelu(self.down(x)))
        return result


def resident_bytes(entry: str) -> int:
    """An entry of /proc/self/status, such as VmRSS."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == entry:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"/proc/self/status has no {entry}")


def process(
    rank: int, path: str, recipe: str, shards: int, sizes: tuple[int, int, int], results: Any
) -> None:
    """One process of one run; puts its rank, its peak, the number of parameters and the bytes it sent into ``results``."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world_size = REPLICAS * shards
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (REPLICAS, shards), mesh_dim_names=("replica", "shard"))
    # Both ways of talking are there before memory is counted.
    dist.barrier()
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    width, inner, blocks = sizes
    with torch.device("meta"):
        model = nn.Sequential(*(Bottleneck(width, inner) for _ in range(blocks)))
    if shards > 1:
        for block in model:
            fully_shard(block, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(rank % shards)
    with torch.no_grad():
        for param in model.parameters():
            local(param).normal_(std=width**-0.5, generator=generator)
    transport: Transport = mesh_transport(mesh) if shards > 1 else ProcessGroupTransport()
    options, steps = RECIPES[recipe]
    optimizer = recipes.build(recipe, model, lr=0.01, transport=transport, dtype="float32", **options)
    data = torch.Generator().manual_seed(100 + rank)
    for _ in range(steps):
        loss = model(torch.randn(2, width, generator=data)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resident_bytes("VmHWM") - before
    num_parameters = sum(p.numel() for p in model.parameters())
    results.put((rank, peak, num_parameters, transport.meter.by_purpose["update"].sent_bytes))
    dist.barrier()
    dist.destroy_process_group()


def measure(recipe: str, shards: int, sizes: tuple[int, int, int]) -> dict[str, Any]:
    """One run: the largest peak of its processes, and what the processes of the first replica sent to the other one."""
    # By its own name, under which every process finds it.
    run = importlib.import_module("benchmarks.sharded_memory").process
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), recipe, shards, sizes, results)
        processes = [
            context.Process(target=run, args=(rank, *arguments)) for rank in range(REPLICAS * shards)
        ]
        for started in processes:
            started.start()
        found = sorted(results.get(timeout=3600) for _ in processes)
        for started in processes:
            started.join()
    return {
        "recipe": recipe,
        "processes": len(processes),
        "shards": shards,
        "parameters": found[0][2],
        "peak_bytes": max(peak for _, peak, _, _ in found),
        "update_bytes": sum(sent for *_, sent in found[:shards]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 18)
    sys.path.insert(0, str(ROOT))
    sizes = (args.width, args.inner, args.blocks)
    runs = []
    for recipe in args.recipes:
        for shards in (1, SHARDS):
            runs.append(measure(recipe, shards, sizes))
            peak = runs[-1]["peak_bytes"]
            print(f"{recipe}, {shards} process(es) a replica: peak {peak / 2**20:.0f} MiB", flush=True)
    made = {"width": args.width, "inner": args.inner, "blocks": args.blocks, "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
