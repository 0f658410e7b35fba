"""What ``bench polar`` measured, as a table and a chart."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonwire.bench.polar import BASELINES, REFERENCE, SQUARE, WIDE, Measurement, geometric_mean, pareto_front
from muonwire.bench.report import by_input, save_panels
from muonwire.polar.auto import METHODS
from muonwire.polar.exact import EXACT
from muonwire.polar.orthonormal import BASES


def summary(rows: Sequence[Measurement], baseline: str = REFERENCE) -> dict[str, float]:
    """Speed of the automatic choice over a baseline: geometric means over all, wide, square, and the list.

    Args:
        rows: measurements.
        baseline: one of ``BASELINES``. Default: torch.optim.Muon's function.
    """
    lists = [r.speed_over(baseline) for r in rows if r.input.startswith("list of") and r.method == "auto"]
    groups = {"all": (*WIDE, *SQUARE), "wide": WIDE, "square": SQUARE}
    means = {name: geometric_mean(rows, shapes, baseline=baseline) for name, shapes in groups.items()}
    return means | {"list": lists[0] if lists else math.nan}


def as_table(rows: Sequence[Measurement]) -> str:
    """The measurements as aligned text, one block for each input, fastest first."""
    width = max(len(r.method) for r in rows)
    lines = []
    for name, block in by_input(rows).items():
        lines += ["", name, f"  {'method'.ljust(width)}      time    speed  polar err  orth err     GFLOP"]
        lines += [
            f"  {r.method.ljust(width)}  {r.seconds * 1e3:8.2f} ms  {r.ratio:5.2f}x  {r.polar_error:9.2e}  "
            f"{r.orthogonality_error:8.2e}  {r.gflop:8.2f}"
            for r in sorted(block, key=lambda r: r.seconds)
        ]
    lines.append("")
    for baseline in BASELINES:
        means = ", ".join(f"{k} {v:.2f}x" for k, v in summary(rows, baseline).items() if not math.isnan(v))
        if means:
            lines.append(f"auto against {baseline}: {means}")
    return "\n".join(lines).lstrip("\n")


def family(method: str) -> str:
    """What a method's point is coloured by: its first word where that is one of ours, else "peers".

    >>> family("newton_schulz jordan"), family("auto"), family("timm")
    ('newton_schulz', 'auto', 'peers')
    """
    if method in BASELINES:
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
        path: .png, .html or .svg.
    """
    import altair as alt

    panels = []
    factors = [r for r in rows if family(r.method) != "orthonormal basis"]
    families = list(dict.fromkeys(family(r.method) for r in factors))
    measured = [r for r in factors if r.shape != (0, 0) and r.polar_error > 0]
    for name, block in by_input(measured).items():
        axes = {
            "x": alt.X("ms:Q", scale=alt.Scale(type="log", nice=False, padding=20), title="time (ms)"),
            "y": alt.Y("error:Q", scale=alt.Scale(type="log"), title="polar error"),
        }
        legend = alt.Legend(title=None, labelLimit=0)
        color = alt.Color("family:N", scale=alt.Scale(domain=families, scheme="dark2"), legend=legend)
        points = alt.Chart(alt.Data(values=[_point(r) for r in block])).mark_point(filled=True, size=45)
        best = pareto_front(block)
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
    save_panels(panels, path)


def _apart(row: Measurement, before: Measurement) -> bool:
    return row.polar_error < before.polar_error / 3 or row.seconds > 2 * before.seconds


def _point(row: Measurement) -> dict[str, Any]:
    return {
        "method": row.method,
        "family": family(row.method),
        "ms": row.seconds * 1e3,
        "error": row.polar_error,
    }
