"""Draw the pictures of docs/polar.md: `make pictures`, or

python benchmarks/draw_polar.py docs/images
"""

import argparse
from pathlib import Path

import numpy as np

from muonwire.pages import Chart, series_chart, write_svg
from muonwire.polar import schedules
from muonwire.polar.minimax import Values, evaluate, minimax_odd

# Those that turn most often first, so that the others lie on top of them.
NAMED = ("cans", "polar_express", "taylor_quintic", "tuned", "jordan")
SINGULAR_VALUES = np.geomspace(1e-3, 1, 1200)


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for chart in (one_step(), published(), convergence()):
        write_svg(chart, out)


def one_step() -> Chart:
    """The best polynomial of each degree on [0.1, 1], and a little below."""
    x = SINGULAR_VALUES[SINGULAR_VALUES >= 0.05]
    lines = {}
    for degree in (3, 5, 7):
        coefficients, error = minimax_odd(lower=0.1, upper=1.0, degree=degree)
        lines[f"degree {degree}: worst {error:.3f}"] = evaluate(coefficients, x)
    title = "One minimax step on [0.1, 1]: the error alternates"
    return singular_values_chart("polar-minimax", title, x, lines)


def published() -> Chart:
    """What the published schedules make of a singular value."""
    lines = {name: schedules.SCHEDULES[name].apply(SINGULAR_VALUES) for name in NAMED}
    title = "Five published schedules, five steps"
    return singular_values_chart("polar-schedules", title, SINGULAR_VALUES, lines)


def singular_values_chart(name: str, title: str, x: Values, lines: dict[str, Values]) -> Chart:
    """Singular values after against before, a line for each polynomial or schedule."""
    return series_chart(
        [
            {"x": float(a), "y": float(b), "series": label}
            for label, y in lines.items()
            for a, b in zip(x, y, strict=True)
        ],
        name=name,
        title=title,
        how_to_read="A polar factor has singular values of 1: the flatter at 1, the better.",
        x_title="singular value before",
        y_title="singular value after",
        log_x=True,
        dots=False,
    )


def convergence() -> Chart:
    """The worst error of the best composition, by its number of steps and the interval."""
    points = [
        {"x": steps, "y": max(worst_error(lower, steps), 1e-12), "series": f"l = {lower:g}"}
        for lower in (0.3, 0.1, 0.03, 0.01, 0.003)
        for steps in range(1, 8)
    ]
    return series_chart(
        points,
        name="polar-convergence",
        title="Worst error of the minimax composition on [l, 1]",
        how_to_read="Once all singular values are near 1 each step cubes the error.",
        x_title="quintic steps",
        y_title="largest |1 − p(σ)|",
        log_y=True,
    )


def worst_error(lower: float, steps: int) -> float:
    """Of the best composition of quintics on [lower, 1]."""
    return schedules.mixed(lower=lower, degrees=(5,) * steps, safety=1.0).worst_error(lower)


if __name__ == "__main__":
    main()
