"""What a comparison came to on each link: measured where its replicas ran on emulated hosts, and modelled for the same link."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from muonwire.compare.config import Comparison
from muonwire.compare.emulate import emulated_metrics, emulated_runs, read_emulated
from muonwire.compare.report.links import LINK_COLUMNS
from muonwire.compare.report.results import read_results
from muonwire.compare.report.target import Target, find_target
from muonwire.compare.runs import Result, Run, find_result, run_folder
from muonwire.train.metrics import read_metrics
from muonwire.transport import Link


def target_of(config: Comparison, summary: list[dict[str, Any]], curves: pl.DataFrame) -> Target | None:
    """The loss at which the first recipe ended, and where each recipe reached it without a link."""
    return find_target(read_results(summary, curves), reference=config.recipes[0]) if summary else None


def stops_of(target: Target | None) -> dict[str, int]:
    """By recipe, the step at which it reaches the target."""
    return {} if target is None else {recipe: reached.step for recipe, reached in target.reached.items()}


def link_curves(config: Comparison, target: Target | None) -> pl.DataFrame:
    """One row for each evaluation of each run on each link of ``--emulate``.

    ``measured_s`` is training time on the emulated link, null where it was not emulated. ``modelled_s`` is the computation of the
    same run and its measured bytes and messages on the link; a peer's computation is its time without a limit.
    """
    rows = []
    for link in config.emulate:
        for run, stop_after in emulated_runs(config, stops_of(target)):
            record = read_emulated(config, run, link, stop_after=stop_after)
            plain = find_result(config)(run)
            assert plain is not None
            computed = plain if record is None or run.recipe in config.peers else record
            compute_s = computed["compute_s_per_step"] + computed["optimizer_s_per_step"]
            for metrics in _metrics(config, run, link, record):
                on_link = Link.parse(link).seconds(
                    egress_bytes=metrics["egress_bytes"],
                    received_bytes=metrics["received_bytes"],
                    num_messages=metrics["num_messages"],
                )
                rows.append(
                    {
                        "link": link,
                        "recipe": run.recipe,
                        "lr": run.lr,
                        "seed": run.seed,
                        "step": metrics["step"],
                        "eval_loss": metrics["eval_loss"],
                        "bytes_egress": metrics["egress_bytes"],
                        "measured_s": metrics.get("measured_s"),
                        "modelled_s": metrics["step"] * compute_s + on_link,
                    }
                )
    return pl.DataFrame(rows, schema=LINK_COLUMNS, orient="row")


def _metrics(config: Comparison, run: Run, link: str, record: Result | None) -> list[dict[str, Any]]:
    if record is not None:
        return emulated_metrics(config, run, link)
    plain = read_metrics(run_folder(config.out, *run))
    # What the kernel counts on an emulated link has no part in a run without one.
    return [{**metrics, "measured_s": None} for metrics in plain if "eval_loss" in metrics]


def link_summary(
    config: Comparison, target: Target | None, curves: pl.DataFrame
) -> dict[Run, dict[str, Any]]:
    """By run, what summary.json says of it on each link; see docs/emulate.md."""
    found: dict[Run, dict[str, Any]] = {}
    for link in config.emulate:
        for run, stop_after in emulated_runs(config, stops_of(target)):
            record = read_emulated(config, run, link, stop_after=stop_after)
            rows = curves.filter(
                pl.col("link") == link, pl.col("recipe") == run.recipe, pl.col("seed") == run.seed
            ).sort("step")
            entry: dict[str, Any] = {
                "emulated": record is not None,
                **_costs("to_target", _reached(rows, target)),
                **_costs("in_all", rows.row(rows.height - 1, named=True) if rows.height else None),
            }
            if record is not None:
                entry |= {
                    "same_losses": _same_losses(config, run, link),
                    **{
                        key: record[key]
                        for key in (
                            "bytes_egress_per_step",
                            "kernel_egress_bytes_per_step",
                            "kernel_over_meter",
                            "retransmitted_segments",
                            "congestion_control",
                        )
                    },
                }
            found.setdefault(run, {})[link] = entry
    return found


def _reached(rows: pl.DataFrame, target: Target | None) -> Mapping[str, Any] | None:
    if target is None:
        return None
    below = rows.filter(pl.col("eval_loss") <= target.loss)
    return below.row(0, named=True) if below.height else None


def _costs(name: str, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """Steps and times at a point of a run; null where it never came there."""
    return {
        f"steps_{name}": row["step"] if row else None,
        f"measured_s_{name}": row["measured_s"] if row else None,
        f"modelled_s_{name}": row["modelled_s"] if row else None,
    }


def _same_losses(config: Comparison, run: Run, link: str) -> bool:
    """Whether the run on the link had, to the last bit, the losses of the run without one."""
    plain = {
        m["step"]: m["eval_loss"] for m in read_metrics(run_folder(config.out, *run)) if "eval_loss" in m
    }
    return all(plain.get(m["step"]) == m["eval_loss"] for m in emulated_metrics(config, run, link))
