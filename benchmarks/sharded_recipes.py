"""Every recipe on two replicas of two processes with sharded weights, against two replicas of one process each.

    python benchmarks/sharded_recipes.py --out evidence/sharded_recipes.json

Both take five steps with the same random gradients, of a model with shards of uneven lengths and empty ones. `difference` is the
largest difference of a weight, over the largest change of a weight in the five steps; `bytes` is what a replica sent, all its
processes together. Replicas that are not the same to the bit end it with an error.
"""

import argparse
import importlib
import json
import multiprocessing
import sys
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muonwire import recipes
from muonwire.transport import Transport, check_replicas, mesh_transport, run_threads
from muonwire.transport.shards import as_sharded, cut_of, is_sharded, place_of

ROOT = Path(__file__).parents[1]
STEPS = 5
WORLD_SIZE = 4


def build_model() -> nn.Sequential:
    """Two hidden matrices of one shape and one of another, with an embedding, a norm and a head of seven rows."""
    torch.manual_seed(0)
    hidden = [
        nn.Linear(10, 33),
        nn.GELU(),
        nn.Linear(33, 33),
        nn.LayerNorm(33),
        nn.Linear(33, 33, bias=False),
    ]
    return nn.Sequential(nn.Embedding(11, 10), *hidden, nn.Linear(33, 7))


def options_of(name: str) -> dict[str, Any]:
    """Options by which recipes compare: an interval of two steps, polar factors in float32, the head by Adam."""
    fields = recipes.RECIPES[name].options.__dataclass_fields__
    wanted = {"interval": 2, "dtype": "float32", "adam": ["6"]}
    return {key: value for key, value in wanted.items() if key in fields} | (
        {"dense": ["3"]} if name == "approach_d" else {}
    )


def whole_of(param: Any) -> Tensor:
    """A copy of the whole weight."""
    weight: Tensor = param.full_tensor() if is_sharded(param) else param
    return weight.detach().clone()


def train(name: str, model: nn.Module, transport: Transport) -> tuple[list[Tensor], int]:
    """The whole shared weights after the last step, the same bits on all replicas, and the bytes of updates that were sent."""
    optimizer = recipes.build(name, model, lr=0.02, transport=transport, **options_of(name))
    for step in range(STEPS):
        for key, param in model.named_parameters():
            seed = zlib.crc32(f"{key} {transport.rank} {step}".encode())
            whole = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            cut = cut_of(param) if is_sharded(param) else None
            if cut is not None:
                own = cut.of(whole, place_of(param)).contiguous()
                whole = as_sharded(own, cut, param)
            param.grad = whole
        optimizer.step()
    optimizer.synchronize()
    with optimizer.shared_weights():
        check_replicas(model, transport)
        weights = [whole_of(p) for p in model.parameters()]
    return weights, transport.meter.by_purpose["update"].sent_bytes


def process(rank: int, path: str, names: Sequence[str], results: Any) -> None:
    """One of four processes; puts its rank and what ``train`` gives for each recipe into ``results``, as lists."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD_SIZE)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    found = {}
    for name in names:
        model = build_model()
        for layer in (model[1], model[3]):
            fully_shard(layer, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
        weights, sent = train(name, model, mesh_transport(mesh))
        found[name] = ([w.numpy() for w in weights], sent)
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def whole(name: str) -> tuple[list[Tensor], int]:
    """The same by two replicas with whole weights."""

    def worker(rank: int, make: Any) -> tuple[list[Tensor], int]:
        return train(name, build_model(), make())

    return run_threads(worker, replicas=2)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(recipes.RECIPES), choices=list(recipes.RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    # By its own name, under which every process finds it.
    run = importlib.import_module("benchmarks.sharded_recipes").process
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "store"), args.recipes, results)
        processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(WORLD_SIZE)]
        for started in processes:
            started.start()
        by_rank = dict(results.get(timeout=600) for _ in processes)
        for started in processes:
            started.join()
    torch.set_num_threads(1)
    runs = []
    for name in args.recipes:
        expected, whole_bytes = whole(name)
        start = [p.detach() for p in build_model().parameters()]
        change = max(float((w - s).abs().max()) for w, s in zip(expected, start, strict=True))
        differences = [
            float((torch.from_numpy(made) - w).abs().max())
            for found in by_rank.values()
            for made, w in zip(found[name][0], expected, strict=True)
        ]
        sent = sum(by_rank[rank][name][1] for rank in (0, 1))
        runs.append(
            {
                "recipe": name,
                "difference": max(differences) / change,
                "bytes": sent,
                "whole_bytes": whole_bytes,
            }
        )
        print(
            f"{name}: difference {runs[-1]['difference']:.2g}, {sent} bytes against {whole_bytes}", flush=True
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"steps": STEPS, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
