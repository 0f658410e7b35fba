"""A small line chart as SVG text, without a charting package."""

from collections.abc import Mapping
from html import escape

import numpy as np
from numpy.typing import NDArray

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
LEFT, TOP, BOTTOM = 48, 32, 36
# The key stands right of the plot, where no line crosses it.
RIGHT, KEY = 16, 170
Lines = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def line_chart(
    lines: Lines, *, title: str, width: int = 640, height: int = 320, log_x: bool = True, log_y: bool = False
) -> str:
    """Lines with a key, and ticks at powers of ten on a logarithmic axis.

    Args:
        lines: name -> (x, y); x positive where ``log_x``, and y where ``log_y``.
        title: text above.
        width: pixels.
        height: pixels.
        log_x: x axis logarithmic. Default: True.
        log_y: y axis logarithmic. Default: False.

    Returns:
        the text of an SVG document.

    >>> chart = line_chart({"p": (np.array([0.1, 1.0]), np.array([0.0, 1.0]))}, title="p")
    >>> chart.count("<polyline"), chart.endswith("</svg>")
    (1, True)
    """
    right = KEY if len(lines) > 1 else RIGHT
    x_all = np.concatenate([x for x, _ in lines.values()])
    x_all = np.log10(x_all) if log_x else x_all
    y_all = np.concatenate([y for _, y in lines.values()])
    y_all = np.log10(y_all) if log_y else np.append(y_all, [0.0, 1.0])
    x0, x1, y0, y1 = x_all.min(), x_all.max(), y_all.min(), y_all.max()
    x_scale = (width - LEFT - right) / max(x1 - x0, 1e-12)
    y_scale = (height - TOP - BOTTOM) / max(y1 - y0, 1e-12)

    def across(v: float) -> float:
        return float(LEFT + (v - x0) * x_scale)

    def down(v: float) -> float:
        return float(height - BOTTOM - (v - y0) * y_scale)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="16" y="18" font-size="13">{escape(title)}</text>'
    ]
    for tick in range(int(np.ceil(x0 - 1e-9)), int(np.floor(x1 + 1e-9)) + 1):
        parts.append(_tick(across(tick), height - BOTTOM, across(tick), TOP))
        label = f"1e{tick}" if log_x else f"{tick}"
        parts.append(f'<text x="{across(tick):.1f}" y="{height - 18}" text-anchor="middle">{label}</text>')
    y_ticks = (
        range(int(np.ceil(y0)), int(np.floor(y1)) + 1)
        if log_y
        else np.arange(np.ceil(y0 * 4), y1 * 4 + 1e-9) / 4
    )
    for tick in y_ticks:
        parts.append(_tick(LEFT, down(tick), width - right, down(tick)))
        label = f"1e{tick}" if log_y else f"{tick:.2f}"
        parts.append(f'<text x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for index, (name, (x, y)) in enumerate(lines.items()):
        color = COLORS[index % len(COLORS)]
        heights = np.log10(y) if log_y else y
        points = " ".join(
            f"{across(a):.1f},{down(b):.1f}"
            for a, b in zip(np.log10(x) if log_x else x, heights, strict=True)
        )
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{points}"/>')
        if len(lines) > 1:
            left, down_to = width - KEY + 10, TOP + 10 + 15 * index
            parts.append(f'<text x="{left}" y="{down_to}" fill="{color}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _tick(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#e4e4e4"/>'
