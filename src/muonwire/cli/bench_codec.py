"""`muonwire bench codec`: rate, distortion and speed of every codec, in one interleaved run."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muonwire.bench import codec as bench
from muonwire.bench.codec_report import as_table, write_chart
from muonwire.bench.report import as_json
from muonwire.cli.arguments import captured_matrices, check_chart, command, matrix_shape
from muonwire.cli.progress import bench_bar

CAPTURED = Path("benchmarks/data/updates.safetensors")
SHAPES = ((2048, 2048),)


@dataclass(frozen=True, kw_only=True)
class BenchCodec:
    """Arguments of `muonwire bench codec`.

    Args:
        shapes: shapes such as 512x2048 of Gaussian and Laplace matrices. Default: 2048x2048.
        codecs: codecs in textual form; empty for the list of this bench.
        captured: a safetensors file of matrices to measure too. Default: benchmarks/data/updates.safetensors where it is there.
        rounds: timed turns of each codec.
        threads: threads of PyTorch; 0 leaves them as they are.
        json: print JSON instead of the table.
        chart: write the rate-distortion chart here; .png, .html, or .svg.
        seed: of the random inputs.
    """

    shapes: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    captured: Path | None = None
    rounds: int = 5
    threads: int = 1
    json: bool = False
    chart: Path | None = None
    seed: int = 0


def run(config: BenchCodec) -> int:
    """Measure, print, write the chart; returns the exit code.

    Raises:
        UsageError: a shape, a codec, the captured file or the chart's suffix is not usable.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    check_chart(config.chart, command="bench codec")
    shapes = [matrix_shape(text, command="bench codec") for text in config.shapes] or list(SHAPES)
    captured = config.captured or (CAPTURED if CAPTURED.is_file() else None)
    matrices: dict[str, Tensor] = {}
    if captured is not None:
        script = "benchmarks/capture_updates.py"
        matrices |= captured_matrices(captured, command="bench codec", script=script)
    matrices |= bench.inputs(shapes, seed=config.seed)
    codecs = config.codecs or bench.CODECS
    with bench_bar("bench codec", total=(1 + config.rounds) * (1 + len(codecs)) * len(matrices)) as note:
        rows = bench.measure(matrices, codecs, rounds=config.rounds, note=note)
    setting = {"rounds": config.rounds, "seed": config.seed}
    print(as_json(rows, setting=setting) if config.json else as_table(rows))
    if config.chart is not None:
        write_chart(rows, config.chart)
    return 0


main = command(
    BenchCodec,
    name="bench codec",
    about=(
        "Measure every codec on captured updates and synthetic matrices: bits a value (of the whole payload) against the "
        "relative error, MB/s of float32 input, and speed over DeMo's own scheme written plainly, interleaved: medians."
    ),
    examples=(
        "muonwire bench codec --chart codecs.html",
        "muonwire bench codec --shapes 512x2048 --codecs 'topk(density=0.05) | sign' 'dct | topk(k=32) | sign(scale=chunk)'",
        "muonwire bench codec --captured my_updates.safetensors --rounds 9 --json",
    ),
)(run)
