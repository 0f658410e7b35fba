"""From the finished runs of a comparison to its tables."""

from dataclasses import fields
from typing import Any

import polars as pl

from muonwire.compare.config import Comparison
from muonwire.compare.report.results import CURVE_COLUMNS, SeedResult
from muonwire.compare.runs import Result, Run, best_lr, candidates, find_result, run_folder, tuning_losses
from muonwire.train.metrics import read_metrics
from muonwire.transport import Link


def summarize(config: Comparison) -> list[dict[str, Any]]:
    """One entry for each recipe and seed at the recipe's best rate, in the order of the recipes; see docs/compare.md."""
    find, link = find_result(config), Link.parse(config.link)
    entries = []
    for recipe in config.recipes:
        lr = best_lr(config, recipe, find)
        in_full = candidates(config, recipe, find)
        # Without a best rate all have diverged, in the short runs where none was left to run in full.
        shown = lr if lr is not None else min(in_full or config.lr_grid)
        tuning = tuning_losses(config, recipe, find)
        for seed in config.seeds_of(recipe):
            result = find(Run(recipe, shown, seed, tuning=not in_full))
            if result is not None:
                entries.append(_entry(recipe, seed, shown, result, link, config) | {"tuning": tuning})
    return entries


def _entry(
    recipe: str, seed: int, lr: float, result: Result, link: Link, config: Comparison
) -> dict[str, Any]:
    # Results of runs without probes lack the diagnostics.
    copied = [f.name for f in fields(SeedResult) if f.name in result and f.name != "diagnostics"]
    return {
        "recipe": recipe,
        "seed": seed,
        "lr": lr,
        **{name: result[name] for name in copied},
        "link_s_per_step": link.seconds(
            egress_bytes=result["bytes_egress_per_step"],
            received_bytes=result["bytes_received_per_step"],
            num_messages=result["messages_per_step"],
        ),
        "options": config.options_of(recipe),
        "lr_at_grid_edge": config.at_edge(recipe, lr),
        "chain": result["optimizer"],
        "weights_digest": result["weights_digest"],
        "diagnostics": result.get("diagnostics", {}),
    }


def curves(config: Comparison) -> pl.DataFrame:
    """One row for each evaluation of each run.

    Cumulative ``measured_s`` is what the steps took here; ``link_s`` is modelled: the run's typical compute and optimizer time a
    step, plus its measured bytes and messages at the link's rate and latency.
    """
    find, link = find_result(config), Link.parse(config.link)
    rows = []
    for recipe in config.recipes:
        best = best_lr(config, recipe, find)
        for seed in config.seeds_of(recipe):
            for lr in config.rates_of(recipe):
                result = find(Run(recipe, lr, seed))
                if result is None:
                    continue
                compute_s = result["compute_s_per_step"] + result["optimizer_s_per_step"]
                for record in read_metrics(run_folder(config.out, recipe, lr, seed)):
                    if "eval_loss" in record:
                        run = {"recipe": recipe, "lr": lr, "seed": seed, "best": lr == best}
                        rows.append({**run, **_point(record, compute_s, link)})
    return pl.DataFrame(rows, schema=CURVE_COLUMNS, orient="row")


def _point(record: dict[str, Any], compute_s: float, link: Link) -> dict[str, Any]:
    on_link = link.seconds(
        egress_bytes=record["egress_bytes"],
        received_bytes=record["received_bytes"],
        num_messages=record["num_messages"],
    )
    return {
        "step": record["step"],
        "train_loss": record.get("train_loss"),
        "eval_loss": record["eval_loss"],
        "bytes_sent": record["sent_bytes"],
        "bytes_received": record["received_bytes"],
        "bytes_egress": record["egress_bytes"],
        "measured_s": record["compute_s"] + record["optimizer_s"] + record["exchange_s"],
        "link_s": record["step"] * compute_s + on_link,
    }
