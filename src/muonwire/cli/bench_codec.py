"""`muonwire bench codec`: rate, distortion and speed of every codec, in one interleaved run."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muonwire.bench import codec as bench
from muonwire.bench.codec import Measurement
from muonwire.cli.arguments import captured_matrices, check_chart, matrix_shape, parse
from muonwire.cli.progress import bench_bar

CAPTURED = Path("benchmarks/data/updates.safetensors")
SHAPES = ((2048, 2048),)
LARGEST_BITS = 40
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross")


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
    print(_as_json(rows, config) if config.json else as_table(rows))
    if config.chart is not None:
        write_chart(rows, config.chart)
    return 0


EXAMPLES = (
    "muonwire bench codec --chart codecs.html",
    "muonwire bench codec --shapes 512x2048 --codecs 'topk(density=0.05) | sign' 'dct | topk(k=32) | sign(scale=chunk)'",
    "muonwire bench codec --captured my_updates.safetensors --rounds 9 --json",
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = (
        "Measure every codec on captured updates and synthetic matrices: bits a value (of the whole payload) against the "
        "relative error, MB/s of float32 input, and speed over DeMo's own scheme written plainly, interleaved: medians."
    )
    return run(parse(BenchCodec, args, command="bench codec", about=about, examples=EXAMPLES))


def as_table(rows: Sequence[Measurement]) -> str:
    """The measurements as aligned text, one block for each input, fewest bits first.

    Args:
        rows: measurements.
    """
    width = max(len(r.codec) for r in rows)
    heading = f"  {'codec'.ljust(width)}  bit/value    bound  rel error  encode MB/s  decode MB/s  x encode  x decode"
    lines = []
    for name in dict.fromkeys(r.input for r in rows):
        block = sorted((r for r in rows if r.input == name), key=lambda r: r.bits)
        lines += ["", f"{name}, {block[0].shape[0]}x{block[0].shape[1]}", heading]
        lines += [
            f"  {r.codec.ljust(width)}  {r.bits:9.4f}  {_number(r.bound_bits):>7}  {r.error:9.4f}  "
            f"{r.encode_mb_s:11.1f}  {r.decode_mb_s:11.1f}  {r.encode_ratio:8.2f}  {r.decode_ratio:8.2f}"
            for r in block
        ]
    lines += [
        "",
        "bound: log2 C(n, k) bits for the positions, and the values as written (a sign: 1 bit); "
        f"x: speed over {bench.REFERENCE!r}",
    ]
    return "\n".join(lines).lstrip("\n")


def write_chart(rows: Sequence[Measurement], path: Path) -> None:
    """Relative error against bits a value for each input; the line is 2^-R, the least error of any code for a Gaussian.

    Args:
        rows: measurements.
        path: .png, .html or .svg.
    """
    import altair as alt

    ours = [r for r in rows if r.codec != bench.REFERENCE]
    least = min(r.bits for r in rows) / 2
    ideal = [least * (LARGEST_BITS / least) ** (i / 200) for i in range(201)]
    order = list(dict.fromkeys(r.codec for r in ours))
    legend = alt.Legend(columns=1, symbolLimit=0, labelLimit=0, title="codec")
    color_scale = alt.Scale(domain=order, scheme="category20")
    color = alt.Color("codec:N", sort=order, scale=color_scale, legend=legend)
    # Colours repeat after twenty.
    shapes = [SYMBOLS[i // 20 % len(SYMBOLS)] for i in range(len(order))]
    shape = alt.Shape("codec:N", sort=order, scale=alt.Scale(domain=order, range=shapes), legend=legend)
    x = alt.X(
        "bits:Q",
        scale=alt.Scale(type="log", domain=[least, LARGEST_BITS], nice=False),
        axis=alt.Axis(values=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]),
        title="bits a value",
    )
    y = alt.Y("error:Q", scale=alt.Scale(domain=[0, 1], clamp=True), title="relative error")
    panels = []
    for name in dict.fromkeys(r.input for r in rows):
        data = alt.Data(values=[_point(r) for r in ours if r.input == name])
        points = alt.Chart(data).mark_point(filled=True, size=50, opacity=1)
        # From the entropy bound to what the codec takes.
        gaps = alt.Chart(data).mark_rule(strokeWidth=1.5).transform_filter("isValid(datum.bound)")
        ends = alt.Chart(data).mark_tick(orient="vertical", size=9, thickness=1.5)
        line = alt.Chart(alt.Data(values=[{"bits": b, "error": 2**-b} for b in ideal]))
        tooltip = ["codec:N", "bits:Q", "bound:Q", "error:Q"]
        panels.append(
            (
                line.mark_line(strokeDash=[4, 3], color="gray").encode(x=x, y=y)
                + gaps.encode(x=x, x2="bound:Q", y=y, color=color)
                + ends.transform_filter("isValid(datum.bound)").encode(x="bound:Q", y=y, color=color)
                + points.encode(x=x, y=y, color=color, shape=shape, tooltip=tooltip)
            ).properties(title=name, width=260, height=190)
        )
    subtitle = (
        "ticks: the entropy bound; dashed: 2^-R, the least error of any code for independent Gaussian values"
    )
    title = alt.Title("Bits against error of each codec", subtitle=subtitle)
    chart = alt.concat(*panels, columns=3).properties(title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        chart.save(str(path), inline=True)
    else:
        chart.save(str(path))


def _point(row: Measurement) -> dict[str, Any]:
    bound = None if math.isnan(row.bound_bits) else row.bound_bits
    return {"codec": row.codec, "bits": row.bits, "bound": bound, "error": row.error}


def _as_json(rows: Sequence[Measurement], config: BenchCodec) -> str:
    setting = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": config.rounds,
        "seed": config.seed,
    }
    found = [{k: _plain(v) for k, v in asdict(r).items()} for r in rows]
    return json.dumps({"setting": setting, "measurements": found}, indent=1)


def _plain(value: Any) -> Any:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
