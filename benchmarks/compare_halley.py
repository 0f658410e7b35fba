"""Ways of making a polar factor in float32 with one factorization or two, beside the plain five steps: time and polar error.

    python benchmarks/compare_halley.py --threads 1

`make measured` runs it, and decision 0017 quotes it. Give it a quiet core; ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2 imitate a processor without AVX-512.
"""

import argparse

import torch
from torch import Tensor

from muonwire.bench.break_even import BUDGET_S, take_turns
from muonwire.bench.polar import plain_steps
from muonwire.polar.exact import halley_weights
from muonwire.polar.halley import LOWER, halley_polar
from muonwire.polar.newton_schulz import normalized
from muonwire.polar.quality import exact_factor, polar_error

SHAPES = ((64, 64), (128, 128), (128, 384), (192, 192), (256, 256), (256, 1024), (512, 512), (512, 2048))
STACKED = 8
LARGEST_STACK = 1e7


def two_steps(x: Tensor) -> Tensor:
    """Two Halley steps for [LOWER, 1], each with a Cholesky factorization; wide matrices in the Gram form."""
    x, low, total = normalized(x, dtype=torch.float32), LOWER, None
    gram, eye = x @ x.mT, torch.eye(x.shape[-2])
    for _ in range(2):
        a, b, c = halley_weights(low)
        low = low * (a + b * low * low) / (1 + c * low * low)
        factor = torch.linalg.cholesky_ex(eye + c * gram).L
        if 2 * x.shape[-1] > 3 * x.shape[-2]:
            step = (a - b / c) * torch.cholesky_inverse(factor) + (b / c) * eye
            gram, total = step @ gram @ step, step if total is None else step @ total
        else:
            x = (b / c) * x + (a - b / c) * torch.cholesky_solve(x, factor)
            gram = x @ x.mT
    return (2 / (1 + low)) * (x if total is None else total @ x)


def main() -> None:
    """Print a row for each shape and spectrum."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=[f"{m}x{n}" for m, n in SHAPES])
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for all ways of one input")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    for m, n in (map(int, text.split("x")) for text in arguments.shapes):
        count = STACKED if m * m * n < LARGEST_STACK else 1
        x = torch.randn(count, m, n, generator=generator)
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        for name, stack in (("gaussian", x), ("1/k", (left / torch.arange(1, m + 1)) @ right)):
            ways = {
                "plain five steps": lambda s=stack: torch.stack([plain_steps(y) for y in s]),
                "two Halley steps": lambda s=stack: two_steps(s),
                "Halley and quintic": lambda s=stack: halley_polar(s, dtype=torch.float32),
            }
            exact = [exact_factor(y) for y in stack]
            times = take_turns(ways, budget_s=arguments.seconds)
            parts = []
            for way, seconds in times.items():
                errors = [
                    polar_error(q, y, exact=e) for q, y, e in zip(ways[way](), stack, exact, strict=True)
                ]
                parts.append(f"{way} {1e3 * seconds / count:.2f} ms, error {sum(errors) / count:.3f}")
            print(f"{m}x{n} {name}: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
