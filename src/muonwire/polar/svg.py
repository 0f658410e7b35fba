"""A small line chart as SVG text, so that a schedule can draw itself without a charting package."""

from collections.abc import Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 32, 36
Lines = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def line_chart(lines: Lines, *, title: str, width: int = 640, height: int = 320, log_y: bool = False) -> str:
    """Lines over a logarithmic x axis.

    Args:
        lines: name -> (x, y); x positive, and y positive where ``log_y``.
        title: text above.
        width: pixels.
        height: pixels.
        log_y: y axis logarithmic too.

    Returns:
        the text of an SVG document.

    >>> chart = line_chart({"p": (np.array([0.1, 1.0]), np.array([0.0, 1.0]))}, title="p")
    >>> chart.count("<polyline"), chart.endswith("</svg>")
    (1, True)
    """
    x_all = np.log10(np.concatenate([x for x, _ in lines.values()]))
    y_all = np.concatenate([y for _, y in lines.values()])
    y_all = np.log10(y_all) if log_y else np.append(y_all, [0.0, 1.0])
    x0, x1, y0, y1 = x_all.min(), x_all.max(), y_all.min(), y_all.max()
    x_scale = (width - LEFT - RIGHT) / max(x1 - x0, 1e-12)
    y_scale = (height - TOP - BOTTOM) / max(y1 - y0, 1e-12)

    def across(v: float) -> float:
        return float(LEFT + (v - x0) * x_scale)

    def down(v: float) -> float:
        return float(height - BOTTOM - (v - y0) * y_scale)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="18" font-size="13">{escape(title)}</text>'
    ]
    for power in range(int(np.ceil(x0 - 1e-9)), int(np.floor(x1 + 1e-9)) + 1):
        parts.append(_tick(across(power), height - BOTTOM, across(power), TOP))
        parts.append(f'<text x="{across(power):.1f}" y="{height - 18}" text-anchor="middle">1e{power}</text>')
    y_ticks = (
        range(int(np.ceil(y0)), int(np.floor(y1)) + 1)
        if log_y
        else np.arange(np.ceil(y0 * 4), y1 * 4 + 1e-9) / 4
    )
    for tick in y_ticks:
        parts.append(_tick(LEFT, down(tick), width - RIGHT, down(tick)))
        label = f"1e{tick}" if log_y else f"{tick:.2f}"
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for index, (name, (x, y)) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        heights = np.log10(y) if log_y else y
        points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(np.log10(x), heights, strict=True))
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>')
        if len(lines) > 1:
            parts.append(
                f'<text x="{LEFT + 8}" y="{TOP + 14 * (index + 1)}" fill="{color}">{escape(name)}</text>'
            )
    return "".join([*parts, "</svg>"])


def _tick(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#e4e4e4"/>'
