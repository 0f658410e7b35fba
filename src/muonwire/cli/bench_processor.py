"""`muonwire bench processor`: measures the row of this processor's class, from which the choices of ``polar`` follow."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from muonwire.bench.break_even import NUM_DECISIONS, BreakEven, measure_row
from muonwire.cli.arguments import parse
from muonwire.cli.progress import bench_bar
from muonwire.polar import find_processor


@dataclass(frozen=True, kw_only=True)
class BenchProcessor:
    """Arguments of `muonwire bench processor`.

    Args:
        threads: threads of PyTorch; 0 leaves them as they are.
    """

    threads: int = 0


EXAMPLES = (
    "muonwire bench processor",
    "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 muonwire bench processor",
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = (
        "Measure what this processor multiplies fast, and from which sizes each way of making a polar factor pays: "
        "the row of its class. Give it quiet cores; it takes about a minute."
    )
    config = parse(BenchProcessor, args, command="bench processor", about=about, examples=EXAMPLES)
    if config.threads:
        torch.set_num_threads(config.threads)
    with bench_bar("bench processor", total=NUM_DECISIONS) as progress:
        measured = measure_row(progress=progress)
    print(as_text(measured))
    return 0


def as_text(measured: BreakEven) -> str:
    """The rates, both times of every size behind a decision, and the row beside the one that the table has.

    Args:
        measured: by ``measure_row``.
    """
    lines = ["products, GFLOP/s by edge"]
    for dtype, rates in measured.rates.gflops.items():
        lines.append(
            f"  {str(dtype)[6:].ljust(9)}" + "".join(f"  {n}: {rate:8.1f}" for n, rate in rates.items())
        )
    for name, times in measured.times.items():
        lines += ["", f"{name}: ms with and without, by short edge"]
        lines += [
            f"  {r.rjust(4)}  {a * 1e3:8.3f}  {b * 1e3:8.3f}  {b / a:5.2f}x" for r, (a, b) in times.items()
        ]
    table = find_processor(torch.device("cpu"))
    lines += ["", f"{'row':16}  {'measured':>16}  {'in the table':>16}"]
    lines += [
        f"{f.name:16}  {_plain(getattr(measured.row, f.name)):>16}  {_plain(getattr(table, f.name)):>16}"
        for f in fields(table)
        if f.name not in ("has", "measured")
    ]
    return "\n".join(lines)


def _plain(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).removeprefix("torch.")
