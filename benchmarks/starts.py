"""How often Lanczos from one random vector misses the largest singular value, and how often from four.

    python -m benchmarks.starts --out evidence/starts.json

Of matrices with 192 singular values of several forms, whose directions are drawn at random: the share of draws in which the
estimate from above is more than 1 or 2 % below the largest, with the first vector alone and with all that `muonwire.polar`
starts from; and what three quintic steps, made for values from 0.0156 to 1, make of the largest in the worst draw.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muonwire.polar.schedules import mixed
from muonwire.polar.spectrum import NUM_PROBES, lanczos, ritz_values

SIZE = 192
SCHEDULE = mixed(lower=2.0**-6, degrees=(5, 5, 5))
# Products are with so many vectors at a time.
AT_ONCE = 4000


def forms(generator: torch.Generator) -> dict[str, Tensor]:
    """Singular values by name, the largest 1."""
    k = torch.arange(1.0, SIZE + 1)
    rest = 0.8 * torch.rand(SIZE - 3, generator=generator).sort(descending=True).values
    return {
        "linear": 1 - 0.95 * (k - 1) / SIZE,
        "1/k": 1 / k,
        "1/sqrt(k)": k**-0.5,
        "exponential": torch.exp(-(k - 1) / 40),
        "three above the rest": torch.cat([torch.tensor([1.0, 0.93, 0.87]), rest]),
    }


def estimates(values: Tensor, draws: int, generator: torch.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(draws, NUM_PROBES) each: the largest Ritz value of each vector, and its estimate from above, of the largest σ² = 1.

    Directions drawn at random beside fixed vectors are the same as vectors drawn at random beside fixed directions.
    """
    matrix = torch.diag(values.square())
    above, seen = [], []
    for first in range(0, draws * NUM_PROBES, AT_ONCE):
        count = min(AT_ONCE, draws * NUM_PROBES - first)
        starts = torch.nn.functional.normalize(torch.randn(count, SIZE, generator=generator), dim=1)
        found = [
            ritz_values(*one, negligible=1e-9)
            for one in zip(*lanczos(matrix, starts, negligible=1e-9), strict=True)
        ]
        seen += [float(one.values[-1]) for one in found]
        above += [one.above for one in found]
    return np.reshape(seen, (draws, NUM_PROBES)), np.reshape(above, (draws, NUM_PROBES))


def measure(draws: int, seed: int) -> list[dict[str, Any]]:
    """A row for each form."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, values in forms(generator).items():
        seen, above = estimates(values, draws, generator)
        one = above[:, 0]
        # As in ``measure_spectrum``: a Ritz value above the first estimate has seen what that has missed.
        four = np.maximum(one, np.where(seen > one[:, None], above, 0.0).max(axis=1))
        row: dict[str, Any] = {"form": name, "draws": draws, "seed": seed}
        for starts, upper in (("one", np.sqrt(one)), ("all", np.sqrt(four))):
            row |= {
                f"{starts}: share more than 1 % below": float((upper < 0.99).mean()),
                f"{starts}: share more than 2 % below": float((upper < 0.98).mean()),
                f"{starts}: smallest": float(upper.min()),
                f"{starts}: the largest becomes": float(np.abs(SCHEDULE.apply(1 / upper)).max()),
            }
        rows.append(row)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="starts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=10_000, help="of each form; default: 10000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = measure(options.draws, options.seed)
    text = json.dumps(rows, indent=2) + "\n"
    print(text, end="")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
