"""`muonwire bench polar`: every polar method against torch.optim.Muon's function, in one interleaved run."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from muonwire.bench import polar as bench
from muonwire.bench.polar import Measurement
from muonwire.cli.arguments import captured_matrices, check_chart, matrix_shape, parse
from muonwire.cli.env import processor_name
from muonwire.cli.progress import bench_bar
from muonwire.errors import UsageError
from muonwire.polar import find_processor
from muonwire.polar.auto import METHODS
from muonwire.polar.exact import EXACT
from muonwire.polar.orthonormal import BASES


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
    print(_as_json(rows) if config.json else as_table(rows))
    if config.chart is not None:
        write_chart(rows, config.chart)
    return 0


EXAMPLES = (
    "muonwire bench polar --shapes 512x2048 --methods auto 'adaptive 0.02'",
    "muonwire bench polar --captured benchmarks/data/momentum.safetensors --chart polar.png --json",
    "muonwire bench polar --shapes 512x2048 1024x1024 --methods auto --rounds 3 --no-mixed-list  # where bfloat16 is slow",
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = (
        "Time every polar method against torch.optim.Muon's and the same five steps in float32, interleaved: medians, errors, "
        "products."
    )
    return run(parse(BenchPolar, args, command="bench polar", about=about, examples=EXAMPLES))


def summary(rows: Sequence[Measurement], baseline: str = bench.REFERENCE) -> dict[str, float]:
    """Speed of the automatic choice over a baseline: geometric means over all, wide, square, and the list.

    Args:
        rows: measurements.
        baseline: one of ``bench.BASELINES``. Default: torch.optim.Muon's function.
    """
    lists = [r.speed_over(baseline) for r in rows if r.input.startswith("list of") and r.method == "auto"]
    groups = {"all": (*bench.WIDE, *bench.SQUARE), "wide": bench.WIDE, "square": bench.SQUARE}
    means = {name: bench.geometric_mean(rows, shapes, baseline=baseline) for name, shapes in groups.items()}
    return means | {"list": lists[0] if lists else math.nan}


def as_table(rows: Sequence[Measurement]) -> str:
    """The measurements as aligned text, one block for each input, fastest first.

    Args:
        rows: measurements.
    """
    width = max(len(r.method) for r in rows)
    lines = []
    for name in dict.fromkeys(r.input for r in rows):
        lines += ["", name, f"  {'method'.ljust(width)}      time    speed  polar err  orth err     GFLOP"]
        block = sorted((r for r in rows if r.input == name), key=lambda r: r.seconds)
        lines += [
            f"  {r.method.ljust(width)}  {r.seconds * 1e3:8.2f} ms  {r.ratio:5.2f}x  {r.polar_error:9.2e}  "
            f"{r.orthogonality_error:8.2e}  {r.gflop:8.2f}"
            for r in block
        ]
    lines.append("")
    for baseline in bench.BASELINES:
        means = ", ".join(f"{k} {v:.2f}x" for k, v in summary(rows, baseline).items() if not math.isnan(v))
        if means:
            lines.append(f"auto against {baseline}: {means}")
    return "\n".join(lines).lstrip("\n")


def family(method: str) -> str:
    """What a method's point is coloured by: its first word where that is one of ours, else "peers".

    Args:
        method: its name.

    >>> family("newton_schulz jordan"), family("auto"), family("timm")
    ('newton_schulz', 'auto', 'peers')
    """
    if method in bench.BASELINES:
        return method
    first = method.split()[0]
    if first in EXACT:
        return "exact"
    if first in BASES:
        return "orthonormal basis"
    return first if first in METHODS else "peers"


def write_chart(rows: Sequence[Measurement], path: Path) -> None:
    """Polar error against time for each input, both logarithmic, with the Pareto front as a line that names its points.

    Bases of Gram-Schmidt and QR are no polar factors and are left out.

    Args:
        rows: measurements.
        path: .png, .html or .svg.
    """
    import altair as alt

    panels = []
    families = [f for f in dict.fromkeys(family(r.method) for r in rows) if f != "orthonormal basis"]
    for name in dict.fromkeys(r.input for r in rows if r.shape != (0, 0)):
        block = [
            r
            for r in rows
            if r.input == name and r.polar_error > 0 and family(r.method) != "orthonormal basis"
        ]
        axes = {
            "x": alt.X("ms:Q", scale=alt.Scale(type="log", nice=False, padding=20), title="time (ms)"),
            "y": alt.Y("error:Q", scale=alt.Scale(type="log"), title="polar error"),
        }
        legend = alt.Legend(title=None, labelLimit=0)
        color = alt.Color("family:N", scale=alt.Scale(domain=families, scheme="dark2"), legend=legend)
        points = alt.Chart(alt.Data(values=[_point(r) for r in block])).mark_point(filled=True, size=45)
        best = bench.pareto_front(block)
        front = alt.Chart(alt.Data(values=[_point(r) for r in best]))
        # Names that would lie on top of one another are left to the table.
        named = [
            r for r, before in zip(best, [None, *best], strict=False) if before is None or _apart(r, before)
        ]
        names = alt.Chart(alt.Data(values=[_point(r) for r in named]))
        panels.append(
            (
                front.mark_line(strokeDash=[4, 3], color="gray").encode(**axes)
                + points.encode(**axes, color=color, tooltip=["method:N", "ms:Q", "error:Q"])
                + names.mark_text(align="left", dx=5, dy=-6, fontSize=9).encode(**axes, text="method:N")
            ).properties(title=name, width=330, height=230)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    chart = alt.concat(*panels, columns=3)
    if path.suffix == ".html":
        chart.save(str(path), inline=True)
    else:
        chart.save(str(path))


def _apart(row: Measurement, before: Measurement) -> bool:
    return row.polar_error < before.polar_error / 3 or row.seconds > 2 * before.seconds


def _point(row: Measurement) -> dict[str, Any]:
    return {
        "method": row.method,
        "family": family(row.method),
        "ms": row.seconds * 1e3,
        "error": row.polar_error,
    }


def _as_json(rows: Sequence[Measurement]) -> str:
    found = [{k: _plain(v) for k, v in asdict(r).items()} for r in rows]
    setting = {
        "machine": processor_name(),
        "processor": find_processor(torch.device("cpu")).name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    means = {b: {k: _plain(v) for k, v in summary(rows, b).items()} for b in bench.BASELINES}
    return json.dumps({"setting": setting, "speed_of_auto": means, "measurements": found}, indent=1)


def _plain(value: Any) -> Any:
    # JSON has no NaN.
    return None if isinstance(value, float) and not math.isfinite(value) else value
