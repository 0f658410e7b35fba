"""`muonwire compare`."""

import re
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
    "sudo muonwire compare --recipes adamw one_bit_muon --peers ddp_adamw --emulate 10mbit/40ms 20mbit:200mbit/40ms",
)
HEADINGS = (
    ("", "", "", "", "bit per", "kB", "s", "s on"),
    ("recipe", "seed", "lr", "loss", "param", "sent", "here", "link"),
)
LINK_HEADINGS = ("recipe", "seed", "steps", "s measured", "s modelled")
COLUMN_GAP = "  "


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = (
        "Train several recipes on the same work: same start, same batches in the same order, as many learning rates. "
        "Writes summary.json, results.parquet, report.html and charts into --out. Finished runs are kept and not repeated."
    )
    config = parse(CompareConfig, args, command="compare", about=about, examples=EXAMPLES)
    summary = compare(config, command=shlex.join(["muonwire", "compare", *args]))
    _print_table(summary, each="replica" if config.sites is None else "site")
    comparison = config.resolve()
    if comparison.known_rates:
        searched = ", ".join(f"{lr:g}" for lr in comparison.lr_grid)
        print(f"rates: the best of an earlier search of {searched}; --lr-grid tries others")
    print(f"report: {config.out / 'report.html'}")
    return 0


def _print_table(summary: Sequence[dict[str, Any]], *, each: str) -> None:
    from rich.console import Console

    console = Console()
    console.print("evaluation loss at each recipe's best rate\n", style="italic")
    table = "\n".join(table_lines(summary, width=console.width))
    # A table that is wider than the terminal is for the terminal to break, which loses nothing.
    console.print(table + "\n", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"per {each} and optimizer step; on link: measured compute and optimizer time, and measured bytes at the stated link",
        style="dim",
    )
    for link in comparison_links(summary):
        console.print(f"\nto the loss at which {summary[0]['recipe']} ended, over {link}\n", style="italic")
        lines = "\n".join(link_lines(summary, link))
        console.print(lines + "\n", highlight=False, markup=False, soft_wrap=True)
    if any(entry["lr_at_grid_edge"] for entry in summary):
        console.print("* the best rate is at the edge of the grid: a wider --lr-grid may find a better one")


def table_lines(summary: Sequence[dict[str, Any]], *, width: int) -> list[str]:
    """The table of a comparison, lowest loss first: the headings, a rule, and the recipes.

    Args:
        summary: of the comparison, as summary.json has it.
        width: in which long recipes are broken; a table of words that do not fit is wider.
    """
    rows = [
        _cells(e) for e in sorted(summary, key=lambda e: (e["final_eval_loss"] is None, e["final_eval_loss"]))
    ]
    widths = [max(map(len, column)) for column in zip(*HEADINGS, *rows, strict=True)]
    left = width - sum(len(COLUMN_GAP) + w for w in widths[1:])
    names = [wrap_recipe(row[0], left) for row in rows]
    widths[0] = max(len(line) for name in (["recipe"], *names) for line in name)

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return COLUMN_GAP.join((first, *others)).rstrip()

    lines = [*map(line, HEADINGS), "─" * len(line(HEADINGS[1]))]
    for (first, *more), (_, *others) in zip(names, rows, strict=True):
        lines += [line((first, *others)), *more]
    return lines


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    here_s = sum(entry[f"{part}_s_per_step"] for part in ("compute", "optimizer", "exchange"))
    return (
        entry["recipe"],
        str(entry["seed"]),
        f"{entry['lr']:g}" + ("*" if entry["lr_at_grid_edge"] else ""),
        "diverged" if entry["final_eval_loss"] is None else f"{entry['final_eval_loss']:.4f}",
        f"{entry['bits_per_parameter_step']:.3g}",
        f"{entry['bytes_sent_per_step'] / 1e3:,.1f}",
        f"{here_s:.3f}",
        f"{here_s - entry['exchange_s_per_step'] + entry['link_s_per_step']:.3f}",
    )


def comparison_links(summary: Sequence[dict[str, Any]]) -> list[str]:
    """The links of --emulate."""
    return list(dict.fromkeys(link for entry in summary for link in entry.get("links", {})))


def link_lines(summary: Sequence[dict[str, Any]], link: str) -> list[str]:
    """The table of one link: steps and seconds of training that each run took to the target, the fastest first."""
    rows = []
    for entry in summary:
        found = entry["links"].get(link, {})
        measured, modelled = (found.get(f"{how}_s_to_target") for how in ("measured", "modelled"))
        steps = found.get("steps_to_target")
        texts = ("–" if seconds is None else f"{seconds:,.1f}" for seconds in (measured, modelled))
        row = (entry["recipe"], str(entry["seed"]), "–" if steps is None else str(steps), *texts)
        seconds = measured if measured is not None else modelled
        rows.append((seconds is None, seconds or 0.0, row))
    cells = [LINK_HEADINGS, *(row for _, _, row in sorted(rows, key=lambda r: r[:2]))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        COLUMN_GAP.join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return [lines[0], "─" * len(lines[0]), *lines[1:]]


def wrap_recipe(recipe: str, width: int) -> list[str]:
    """The lines of a recipe's name: broken after commas, opening parentheses and spaces only, and never within a word.

    >>> wrap_recipe("one_bit_muon(interval=28, growth=0.045, outer_momentum=0.5)", 24)
    ['one_bit_muon(', '  interval=28,', '  growth=0.045,', '  outer_momentum=0.5)']
    >>> wrap_recipe("one_bit_muon", 4)
    ['one_bit_muon']
    """
    if len(recipe) <= width:
        return [recipe]
    lines = [""]
    for piece in re.split(r"(?<=[,( ])(?=[^ ])", recipe):
        if lines[-1].strip() and len((lines[-1] + piece).rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return [line.rstrip() for line in lines]
