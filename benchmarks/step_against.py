"""Times an optimizer's step in two source trees, turn by turn, and compares the memory that each holds.

    git worktree add /tmp/before COMMIT
    python benchmarks/step_against.py --other /tmp/before/src --out evidence/step.json

docs/optimizer.md quotes it; the tests run one process of it. Each tree has a process of its own for each recipe; the two take
turns, so that what else the machine does affects both alike. Gradients are made beforehand. Replicas are threads that take
turns, so a step with two replicas is the work of both. Both trees take the processor for one of class avx2, so that polar
factors are made alike, and the allocator gives no memory back, since which run pays for page faults is chance.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1] / "src"
ALIKE = {
    "MUONWIRE_PROCESSOR": "avx2",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "PYTHONWARNINGS": "ignore",
}
RECIPES = ("adamw", "muon", "distro", "dion", "ef21_muon", "one_bit_muon", "local_adamw")
SIZES = {"small": (128, 4), "large": (384, 4)}


def worker(recipe: str, size: str, replicas: int) -> None:
    """Takes as many steps as each line on standard input says, and answers when they are done."""
    import torch
    from torch import nn

    from muonwire import recipes

    torch.set_num_threads(1)
    try:
        from muonwire.transport import run_threads
    except ImportError:
        from muonwire.exchange import run_threads
    width, layers = SIZES[size]

    def build(rank: int, make: Callable[[], Any]) -> None:
        transport = make()
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(256, width),
            *(
                nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width))
                for _ in range(layers)
            ),
        )
        word = "transport" if "transport" in recipes.build.__code__.co_varnames else "exchange"
        optimizer = recipes.build(recipe, model, lr=1e-4, **({word: transport} if replicas > 1 else {}))
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3

        def steps(count: int) -> None:
            for _ in range(count):
                for p in model.parameters():
                    assert p.grad is not None
                    p.grad = p.grad.clone()  # as a backward pass leaves new gradients
                optimizer.step()

        steps(12)
        if rank == 0:
            state = sum(t.numel() * t.element_size() for t in tensors(optimizer.state_dict()))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps({"state_bytes": state, "peak_rss_kib": peak}), flush=True)
        while True:
            if rank == 0:
                command[0] = sys.stdin.readline().strip()
            transport.gather(b"")
            if not command[0]:
                return
            steps(int(command[0]))
            transport.gather(b"")
            if rank == 0:
                print("done", flush=True)

    def tensors(tree: Any) -> Iterator[torch.Tensor]:
        if isinstance(tree, torch.Tensor):
            yield tree
        elif isinstance(tree, dict | list | tuple):
            for value in tree.values() if isinstance(tree, dict) else tree:
                yield from tensors(value)

    command = [""]
    run_threads(build, replicas=replicas)


def compare(recipe: str, size: str, replicas: int, other: Path, *, turns: int, steps: int) -> dict[str, Any]:
    """Medians of both trees, the median of the turns' ratios, and what each holds."""
    processes = {}
    for tree, source in (("other", other), ("here", HERE)):
        processes[tree] = subprocess.Popen(
            [sys.executable, __file__, "--worker", recipe, size, str(replicas)],
            env={**os.environ, **ALIKE, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(tree: str) -> str:
        output = processes[tree].stdout
        assert output is not None
        return output.readline()

    memory = {tree: json.loads(answer(tree)) for tree in processes}
    times: dict[str, list[float]] = {tree: [] for tree in processes}
    for turn in range(turns):
        for tree in sorted(processes, reverse=bool(turn % 2)):
            start = time.perf_counter()
            print(steps, file=processes[tree].stdin, flush=True)
            answer(tree)
            times[tree].append((time.perf_counter() - start) / steps)
    for process in processes.values():
        process.communicate()
    return {
        "recipe": recipe,
        "size": size,
        "replicas": replicas,
        "other_ms": 1e3 * statistics.median(times["other"]),
        "here_ms": 1e3 * statistics.median(times["here"]),
        "ratio": statistics.median(h / o for h, o in zip(times["here"], times["other"], strict=True)),
        **{f"{tree}_{key}": value for tree, held in memory.items() for key, value in held.items()},
    }


def machine() -> str:
    """The processor's name, where the system says it."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="the src folder of the other tree")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--steps", type=int, default=11, help="of a turn; 11 is one_bit_muon's interval")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker[0], given.worker[1], int(given.worker[2]))
        return
    rows = []
    for size in given.sizes:
        for replicas in (1, 2):
            for recipe in given.recipes:
                row = compare(recipe, size, replicas, given.other, turns=given.turns, steps=given.steps)
                rows.append(row)
                print(
                    f"{recipe:14s} {size:6s} {replicas} replica(s): {row['here_ms']:8.3f} ms, other {row['other_ms']:8.3f} ms, "
                    f"ratio {row['ratio']:.3f}; state {row['here_state_bytes'] / row['other_state_bytes']:.3f}, peak memory "
                    f"{row['here_peak_rss_kib'] / row['other_peak_rss_kib']:.3f}",
                    flush=True,
                )
    if given.out:
        given.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
