"""`muonwire bench polar`: every polar method against torch.optim.Muon's function, in one interleaved run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from muonwire.bench import polar as bench
from muonwire.bench.polar_report import as_table, summary, write_chart
from muonwire.bench.report import as_json
from muonwire.cli.arguments import captured_matrices, check_chart, command, matrix_shape
from muonwire.cli.env import processor_name
from muonwire.cli.progress import bench_bar
from muonwire.errors import UsageError
from muonwire.polar import find_processor


@dataclass(frozen=True, kw_only=True)
class BenchPolar:
    """Arguments of `muonwire bench polar`.

    Args:
        shapes: shapes such as 512x2048. The first one is also measured with the spectra 1/k, log-normal rows
            and half rank. Default: five wide and three square ones.
        methods: names of methods; empty for all.
        captured: a safetensors file of matrices to measure too, such as benchmarks/data/momentum.safetensors.
        rounds: timed turns of each method.
        threads: threads of PyTorch; 0 leaves them as they are.
        listed: measure a list of so many of each shape too; 0 for none.
        mixed_list: measure the list of 30 of 576x576 and 60 of 576x1536 too.
        json: print JSON instead of the table.
        chart: write the Pareto chart of error against time here; .png, .html, or .svg.
        seed: of the random inputs.
    """

    shapes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    captured: Path | None = None
    rounds: int = 9
    threads: int = 0
    listed: int = 0
    mixed_list: bool = True
    json: bool = False
    chart: Path | None = None
    seed: int = 0


def run(config: BenchPolar) -> int:
    """Measure, print, write the chart; returns the exit code.

    Raises:
        UsageError: a shape, a method, the captured file or the chart's suffix is not usable.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    shapes = [matrix_shape(text, command="bench polar") for text in config.shapes] or [
        *bench.WIDE,
        *bench.SQUARE,
    ]
    table = bench.methods()
    unknown = [name for name in config.methods if name not in table]
    if unknown:
        raise UsageError(f"bench polar: {', '.join(unknown)} is not a method; allowed are {', '.join(table)}")
    check_chart(config.chart, command="bench polar")
    chosen = {name: table[name] for name in config.methods} or table
    matrices = bench.inputs(shapes, seed=config.seed)
    if config.captured is not None:
        script = "benchmarks/capture_momentum.py"
        matrices |= captured_matrices(config.captured, command="bench polar", script=script)
    with bench_bar("bench polar", total=len(matrices)) as progress:
        rows = bench.measure(matrices, chosen, rounds=config.rounds, progress=progress)
    if config.listed:
        for m, n in shapes:
            rows += bench.measure_list(
                [(m, n)] * config.listed,
                rounds=config.rounds,
                seed=config.seed,
                name=f"{config.listed} of {m}x{n}",
            )
    if config.mixed_list:
        rows += bench.measure_list(rounds=max(1, config.rounds // 3), seed=config.seed)
    if config.json:
        setting = {"machine": processor_name(), "processor": find_processor(torch.device("cpu")).name}
        means = {baseline: summary(rows, baseline) for baseline in bench.BASELINES}
        print(as_json(rows, setting=setting, speed_of_auto=means))
    else:
        print(as_table(rows))
    if config.chart is not None:
        write_chart(rows, config.chart)
    return 0


main = command(
    BenchPolar,
    name="bench polar",
    about=(
        "Time every polar method against torch.optim.Muon's and the same five steps in float32, interleaved: medians, errors, "
        "products."
    ),
    examples=(
        "muonwire bench polar --shapes 512x2048 --methods auto 'adaptive 0.02'",
        "muonwire bench polar --captured benchmarks/data/momentum.safetensors --chart polar.png --json",
        "muonwire bench polar --shapes 512x2048 1024x1024 --methods auto --rounds 3 --no-mixed-list  # where bfloat16 is slow",
    ),
)(run)
