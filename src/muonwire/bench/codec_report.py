"""What ``bench codec`` measured, as a table and a chart."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muonwire.bench.codec import REFERENCE, Measurement
from muonwire.bench.report import by_input, save_panels

LARGEST_BITS = 40
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "cross")


def as_table(rows: Sequence[Measurement]) -> str:
    """The measurements as aligned text, one block for each input, fewest bits first."""
    width = max(len(r.codec) for r in rows)
    heading = f"  {'codec'.ljust(width)}  bit/value    bound  rel error  encode MB/s  decode MB/s  x encode  x decode"
    lines = []
    for name, block in by_input(rows).items():
        lines += ["", f"{name}, {block[0].shape[0]}x{block[0].shape[1]}", heading]
        lines += [
            f"  {r.codec.ljust(width)}  {r.bits:9.4f}  {_number(r.bound_bits):>7}  {r.error:9.4f}  "
            f"{r.encode_mb_s:11.1f}  {r.decode_mb_s:11.1f}  {r.encode_ratio:8.2f}  {r.decode_ratio:8.2f}"
            for r in sorted(block, key=lambda r: r.bits)
        ]
    lines += [
        "",
        f"bound: log2 C(n, k) bits for the positions, and the values as written (a sign: 1 bit); x: speed over {REFERENCE!r}",
    ]
    return "\n".join(lines).lstrip("\n")


def write_chart(rows: Sequence[Measurement], path: Path) -> None:
    """Relative error against bits a value for each input; the line is 2^-R, the least error of any code for a Gaussian.

    Args:
        path: .png, .html or .svg.
    """
    import altair as alt

    ours = [r for r in rows if r.codec != REFERENCE]
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
    for name, block in by_input(ours).items():
        data = alt.Data(values=[_point(r) for r in block])
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
    save_panels(panels, path, title=alt.Title("Bits against error of each codec", subtitle=subtitle))


def _point(row: Measurement) -> dict[str, Any]:
    bound = None if math.isnan(row.bound_bits) else row.bound_bits
    return {"codec": row.codec, "bits": row.bits, "bound": bound, "error": row.error}


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
