"""Where the time of the chunked cosine codec goes, against its dense products alone: `make measured`, or

python benchmarks/profile_dct_codec.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from muonwire.codec import parse
from muonwire.codec.part import Round
from muonwire.codec.transform.dct import cosine_basis

ROUNDS = 21


def main() -> None:
    """Print a line for each part of encoding and decoding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    codec = parse("dct(chunk=64) | topk(k=32) | sign(scale=chunk)")
    basis = cosine_basis(64, torch.float32, x.device)
    blocks = codec.transform.forward(x, Round())
    groups = codec.select.groups(*blocks.shape)
    items = codec.select.choose(blocks).numpy()
    payload = codec.encode(x)
    left, right = x.view(32, 64, 2048), x.view(-1, 64)
    calls: dict[str, Callable[[], object]] = {
        "copy": x.clone,
        "encode": lambda: codec.encode(x),
        "encode: transform": lambda: codec.transform.forward(x, Round()),
        "encode: both dense products alone": lambda: (basis @ left, right @ basis.mT),
        "encode: selection": lambda: codec.select.choose(blocks),
        "encode: packing": lambda: codec.pack.encode(items, groups),
        "decode": lambda: codec.decode(payload),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    for name, spent in times.items():
        print(f"{name:36s} {statistics.median(spent) * 1e3:6.2f} ms")


if __name__ == "__main__":
    main()
