"""`muonwire compare`."""

import shlex
from collections.abc import Sequence
from typing import Any

from muonwire.cli.arguments import parse
from muonwire.compare import CompareConfig, compare

EXAMPLES = (
    "muonwire compare --preset quick --out runs/demo",
    "muonwire compare --recipes muon 'one_bit_muon(interval=20)' --lr-grid 0.006 0.012 --seeds 0 1 2",
    "muonwire compare --preset frontier --virtual --compile --out runs/frontier",
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
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # Without vertical rules the table fits 80 columns.
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title="evaluation loss at each recipe's best rate"
    )
    table.add_column("recipe", overflow="fold")
    for heading in ("seed", "lr", "loss", "bit/param", "kB sent", "s here", "s on link"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in sorted(summary, key=lambda e: (e["final_eval_loss"] is None, e["final_eval_loss"])):
        here_s = sum(entry[f"{part}_s_per_step"] for part in ("compute", "optimizer", "exchange"))
        table.add_row(
            entry["recipe"],
            str(entry["seed"]),
            f"{entry['lr']:g}" + ("*" if entry["lr_at_grid_edge"] else ""),
            "diverged" if entry["final_eval_loss"] is None else f"{entry['final_eval_loss']:.4f}",
            f"{entry['bits_per_parameter_step']:.3g}",
            f"{entry['bytes_sent_per_step'] / 1e3:,.1f}",
            f"{here_s:.3f}",
            f"{here_s - entry['exchange_s_per_step'] + entry['link_s_per_step']:.3f}",
        )
    console = Console()
    console.print(table)
    console.print(
        "per replica and optimizer step; on link: measured compute and optimizer time, and measured bytes at the stated link",
        style="dim",
    )
    if any(entry["lr_at_grid_edge"] for entry in summary):
        console.print("* the best rate is at the edge of the grid: a wider --lr-grid may find a better one")
