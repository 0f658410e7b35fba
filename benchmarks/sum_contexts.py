"""What replicas know of a sum of signs before it comes, on gradients of the text task.

    python -m benchmarks.sum_contexts --replicas 16 --out evidence/owners/contexts.json
    python -m benchmarks.sum_contexts --replicas 64 --synchronizations 2 5 --out evidence/owners/contexts.json
    python -m benchmarks.sum_contexts --times

`one_bit_muon` with lossless means, on replicas that are threads. Of some synchronizations: the entropy of an entry's number n of
positive signs, and what is left of it where something is known: the tensor, the entry's n of the synchronization before ("last"),
of the last two in eight classes each, the outer momentum in sixteen, the sign of one replica itself ("own"); the same of that
replica's signs; and what `codec/sums.py` takes for n, all bytes of its bodies included, in the pieces that the owners have.
Entropies are those of the frequencies that were found, in bits an entry.

`--times`: seconds of one core for packing and for unpacking signs, and sums of 64, whose last sums are known, or are not.
"""

import argparse
import json
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.owners import INTERVAL, optimizer_of, text_steps

from muonwire.codec import sums
from muonwire.codec.pack.fields import Ints
from muonwire.stages.base import Context
from muonwire.stages.owners import Owners
from muonwire.stages.pieces import cut
from muonwire.transport import run_threads

SCALE_BYTES = 2


class Watched:
    """Takes the signs out of what replicas send to owners, and adds them up."""

    def __init__(self) -> None:
        self.totals: dict[int, Ints] = {}
        self.own: Ints = np.zeros(0, dtype=np.int64)
        self._rounds = Owners.rounds

    def rounds(
        self,
        owners: Owners,
        bodies: Any,
        shapes: Any,
        scales: Any,
        states: Any,
        context: Context,
        devices: Any,
    ) -> Generator[Any, Any, Any]:
        """In place of ``Owners.rounds``."""
        transport, step = context.transport, context.step
        signs = np.zeros(sum(map(int, map(np.prod, shapes))), dtype=np.int64)
        starts = np.cumsum([0, *map(np.prod, shapes)])
        for pieces, of_owner in zip(owners.pieces(shapes, transport.world_size), bodies, strict=True):
            for piece, body in zip(pieces, of_owner, strict=True):
                count, begin = piece.end - piece.begin, int(starts[piece.tensor]) + piece.begin
                signs[begin : begin + count] = sums.positive(body, count, scale=body[:SCALE_BYTES])
        self.totals[step] = self.totals.get(step, 0) + signs
        if transport.rank == 0:
            self.own = signs
        return (yield from self._rounds(owners, bodies, shapes, scales, states, context, devices))


def left(values: Ints, *known: Ints) -> float:
    """The entropy of ``values`` in bits each, where ``known`` is known."""
    classes = np.zeros(len(values), dtype=np.int64)
    for of in known:
        classes = classes * (int(of.max()) + 1) + of
    _, classes = np.unique(classes, return_inverse=True)
    size = int(values.max()) + 1
    table = np.bincount(classes * size + values).astype(np.float64)
    table = np.pad(table, (0, -len(table) % size)).reshape(-1, size)
    shares = table / table.sum(1, keepdims=True)
    return float(-(table * np.log2(np.where(shares > 0, shares, 1))).sum() / len(values))


def measured(
    n: Ints, own: Ints, before: list[Ints], momentum: npt.NDArray[Any], shapes: Any, replicas: int
) -> dict[str, float]:
    """The entropies of one synchronization; ``before`` are the sums of those before it, the last one at the end."""
    tensors = np.repeat(np.arange(len(shapes)), [int(np.prod(shape)) for shape in shapes])
    edges = np.quantile(momentum, np.linspace(0, 1, 17)[1:-1])
    last = before[-1]
    two = [of * 8 // (replicas + 1) for of in before[-2:]]
    bits = 0
    starts = np.cumsum([0, *map(np.prod, shapes)])
    for piece in (p for pieces in cut(shapes, replicas, "entry") for p in pieces):
        part = slice(int(starts[piece.tensor]) + piece.begin, int(starts[piece.tensor]) + piece.end)
        known = sums.Known(count=piece.end - piece.begin, levels=sums.levels_of(last[part], replicas))
        bits += 8 * len(sums.pack(n[part], replicas, known))
    return {
        "sum": left(n),
        "sum, tensor": left(n, tensors),
        "sum, last": left(n, last),
        "sum, last two": left(n, *two),
        "sum, momentum": left(n, np.searchsorted(edges, momentum, side="right")),
        "sum, own": left(n, own),
        "sum, last and own": left(n, last, own),
        "sum, packed": bits / len(n),
        "sign": left(own),
        "sign, last": left(own, last),
        "sign, last two": left(own, *two),
        "correlation with last": float(np.corrcoef(n, last)[0, 1]),
    }


def run(replicas: int, synchronizations: list[int], size: str) -> list[dict[str, Any]]:
    """The records of these synchronizations."""
    watched, results = Watched(), []
    rounds, Owners.rounds = Owners.rounds, lambda *a: watched.rounds(*a)  # type: ignore[method-assign]

    def worker(rank: int, make: Any) -> None:
        model, optimizer = optimizer_of("lossless", make(), size, interval=INTERVAL)
        before: list[Ints] = []
        params = [p for group in optimizer.param_groups for p in group["params"]]
        momentum = np.zeros(sum(p.numel() for p in params))
        for number in text_steps(model, optimizer, size, last=max(synchronizations)):
            if rank:
                continue
            # All have given their signs by now, and begin with the next synchronization's after this replica has sent its own.
            ((_, n),) = watched.totals.items()
            watched.totals, own = {}, watched.own
            if number in synchronizations:
                shapes = tuple(tuple(p.shape) for p in params)
                record = measured(n, own, before, momentum, shapes, replicas)
                results.append({"replicas": replicas, "synchronization": number, **record})
                print(json.dumps(results[-1]), flush=True)
            states = [optimizer.state[p]["outer"]["momentum"]["buffer"] for p in params]
            momentum = torch.cat([buffer.flatten() for buffer in states]).numpy().copy()
            before = [*before[-1:], n]

    try:
        run_threads(worker, replicas=replicas)
    finally:
        Owners.rounds = rounds  # type: ignore[method-assign]
    return results


def times(count: int = 1 << 20, repeats: int = 5) -> None:
    """Print nanoseconds an entry, the best of some repeats."""
    random = np.random.default_rng(0)
    levels = random.integers(0, sums.LARGEST_LEVEL + 1, count).astype(np.uint8)
    for replicas in (1, 64):
        counts = random.binomial(replicas, 0.2 + 0.6 * levels / sums.LARGEST_LEVEL)
        for known in (levels, None):
            packing, unpacking = [], []
            for _ in range(repeats):
                start_s = time.process_time()
                body = sums.pack(counts, replicas, sums.Known(count=count, levels=known))
                middle_s = time.process_time()
                sums.unpack(body, count, largest=replicas, known=sums.Known(count=count, levels=known))
                packing.append(middle_s - start_s)
                unpacking.append(time.process_time() - middle_s)
            best = {"packing_ns": 1e9 * min(packing) / count, "unpacking_ns": 1e9 * min(unpacking) / count}
            print(json.dumps({"replicas": replicas, "known": known is not None, **best}))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--synchronizations", type=int, nargs="+", default=[2, 5, 20])
    parser.add_argument("--model-size", default="nano")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    if a.times:
        return times()
    results = [r for replicas in a.replicas for r in run(replicas, a.synchronizations, a.model_size)]
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        # What the file has of other numbers of replicas stays.
        before = json.loads(a.out.read_text()) if a.out.exists() else []
        results = [r for r in before if r["replicas"] not in a.replicas] + results
        a.out.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
