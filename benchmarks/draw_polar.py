"""Draw the pictures of docs/polar.md: python benchmarks/draw_polar.py docs/images"""

import sys
from pathlib import Path

import numpy as np

from muonwire.bench import svg
from muonwire.polar import schedules
from muonwire.polar.minimax import evaluate, minimax_odd


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    x = np.geomspace(1e-3, 1, 1200)

    made = {}
    for degree in (3, 5, 7):
        coefficients, error = minimax_odd(lower=0.1, upper=1.0, degree=degree)
        inside = x[x >= 0.05]
        made[f"degree {degree}: worst {error:.3f}"] = (inside, evaluate(coefficients, inside))
    title = "One minimax step on [0.1, 1]: the error alternates"
    (out / "polar-minimax.svg").write_text(svg.line_chart(made, title=title))

    named = ("jordan", "tuned", "polar_express", "cans", "taylor_quintic")
    lines = {name: (x, schedules.SCHEDULES[name].apply(x)) for name in named}
    (out / "polar-schedules.svg").write_text(
        svg.line_chart(lines, title="Five published schedules, five steps")
    )

    lines = {}
    for lower in (0.3, 0.1, 0.03, 0.01, 0.003):
        errors = [
            schedules.mixed(lower=lower, degrees=(5,) * steps, safety=1.0).worst_error(lower)
            for steps in range(1, 8)
        ]
        lines[f"l = {lower:g}"] = (np.arange(1.0, 8.0), np.maximum(errors, 1e-12))
    title = "Worst error of the minimax composition on [l, 1] against quintic steps 1 … 7"
    (out / "polar-convergence.svg").write_text(svg.line_chart(lines, title=title, log_x=False, log_y=True))


if __name__ == "__main__":
    main()
