"""Bits over log2 C(n, k) and MB/s (of the float32 tensor that was selected from) of every packer, as a table in Markdown.

Run: `python benchmarks/measure_packers.py`. One core; the best of five repeats, in which the packers take turns.
"""

import math
import time

import numpy as np

from muonwire.codec import Ans, Bitmap, Bits, Ranks, Rice
from muonwire.codec.pack import Pack
from muonwire.codec.select import Groups

REPEATS = 5
CHUNK = 4096
CASES = [
    *(Groups(num_groups=256, group_numel=CHUNK, k=k) for k in (4, 8, 16, 32, 64)),
    *(
        Groups(num_groups=1, group_numel=512 * 2048, k=round(d * 512 * 2048))
        for d in (0.01, 0.02, 0.05, 0.1, 0.2)
    ),
    *(Groups(num_groups=16, group_numel=CHUNK, k=k) for k in (4, 8, 16, 32, 64)),
    *(Groups(num_groups=1, group_numel=1 << 16, k=round(d * (1 << 16))) for d in (0.01, 0.05, 0.2)),
    Groups(num_groups=1, group_numel=64, k=3),
]


def drawn(groups: Groups) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = [
        np.sort(generator.choice(groups.group_numel, groups.k, replace=False)) + i * groups.group_numel
        for i in range(groups.num_groups)
    ]
    return np.concatenate(rows).astype(np.int64)


def bound_bits(groups: Groups) -> float:
    n, k = groups.group_numel, groups.k
    nats = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return groups.num_groups * nats / math.log(2)


def measured(packers: list[Pack], groups: Groups) -> list[str]:
    items = drawn(groups)
    encode, decode, sizes = {}, {}, {}
    for _ in range(REPEATS):
        for packer in packers:
            if isinstance(packer, Ranks) and not Ranks.fits(groups):
                continue
            start = time.perf_counter()
            data = packer.encode(items, groups)
            middle = time.perf_counter()
            decoded, _ = packer.decode(data, groups)
            end = time.perf_counter()
            assert (decoded == items).all()
            encode[packer] = min(encode.get(packer, math.inf), middle - start)
            decode[packer] = min(decode.get(packer, math.inf), end - middle)
            sizes[packer] = len(data)
    megabytes = groups.numel * 4 / 1e6
    return [
        f"{8 * sizes[p] / bound_bits(groups):.4f} ({megabytes / encode[p]:.0f}/{megabytes / decode[p]:.0f})"
        if p in sizes
        else "-"
        for p in packers
    ]


def main() -> None:
    packers: list[Pack] = [Ans(), Rice(), Bitmap(), Ranks(), Bits()]
    print("| groups × items, k | " + " | ".join(map(str, packers)) + " |")
    print("|---|" + "---|" * len(packers))
    for groups in CASES:
        cells = " | ".join(measured(packers, groups))
        print(f"| {groups.num_groups} × {groups.group_numel}, {groups.k} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
