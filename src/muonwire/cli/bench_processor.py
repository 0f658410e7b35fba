"""`muonwire bench processor`: measures the row of this processor's class, from which the choices of ``polar`` follow."""

from dataclasses import dataclass

import torch

from muonwire.bench.break_even import NUM_DECISIONS, as_text, measure_row
from muonwire.cli.arguments import command
from muonwire.cli.progress import bench_bar


@dataclass(frozen=True, kw_only=True)
class BenchProcessor:
    """Arguments of `muonwire bench processor`.

    Args:
        threads: threads of PyTorch; 0 leaves them as they are.
    """

    threads: int = 0


@command(
    BenchProcessor,
    name="bench processor",
    about=(
        "Measure what this processor multiplies fast, and from which sizes each way of making a polar factor pays: "
        "the row of its class. Give it quiet cores; it takes about a minute."
    ),
    examples=(
        "muonwire bench processor",
        "ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 muonwire bench processor",
    ),
)
def main(options: BenchProcessor) -> int:
    """Run the command; returns the exit code."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with bench_bar("bench processor", total=NUM_DECISIONS) as progress:
        measured = measure_row(progress=progress)
    print(as_text(measured))
    return 0
