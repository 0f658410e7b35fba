"""`muonwire compare`."""

import shlex
from collections.abc import Sequence
from typing import Any

from muonwire.cli.arguments import parse
from muonwire.compare import CompareConfig, compare

EXAMPLES = (
    "muonwire compare --preset quick --out runs/demo",
    "muonwire compare --recipes muon 'local_muon(interval=10)' --lr-grid 0.006 0.012 --seeds 0 1 2",
    "muonwire compare --text book1.txt book2.txt --link 100mbit/20ms --replicas 2 --steps 500",
)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = (
        "Train several recipes on the same work: same start, same batches in the same order, same grid of learning rates. "
        "Writes summary.json, results.parquet, report.html and charts into --out. Finished runs are kept and not repeated."
    )
    config = parse(CompareConfig, args, command="compare", about=about, examples=EXAMPLES)
    summary = compare(config, command=shlex.join(["muonwire", "compare", *args]))
    _print_table(summary)
    print(f"report: {config.out / 'report.html'}")
    return 0


def _print_table(summary: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="evaluation loss at each recipe's best rate")
    table.add_column("recipe", no_wrap=True)
    for heading in ("seed", "lr", "loss", "bits/param/step", "sent/step", "compute s", "optimizer s", "exchange s", "link s"):
        table.add_column(heading, justify="right")
    for entry in sorted(summary, key=lambda e: (e["final_eval_loss"] is None, e["final_eval_loss"])):
        loss = "diverged" if entry["final_eval_loss"] is None else f"{entry['final_eval_loss']:.4f}"
        table.add_row(
            entry["recipe"],
            str(entry["seed"]),
            f"{entry['lr']:g}" + ("*" if entry["lr_at_grid_edge"] else ""),
            loss,
            f"{entry['bits_per_parameter_step']:.3g}",
            f"{entry['bytes_sent_per_step'] / 1e3:,.1f} kB",
            *(f"{entry[f'{part}_s_per_step']:.3f}" for part in ("compute", "optimizer", "exchange", "link")),
        )
    console = Console()
    console.print(table)
    if any(entry["lr_at_grid_edge"] for entry in summary):
        console.print("* the best rate is at the edge of the grid: a wider --lr-grid may find a better one")
