"""Made comparisons: plausible curves, rates, bytes and times, with known endings."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from muonwire.compare.report import ReportSetting

NUM_PARAMETERS = 1_200_000
START = 5.5


@dataclass(frozen=True, kw_only=True)
class Made:
    """A recipe to make up: where it ends, what it sends and computes, and whether it diverges."""

    recipe: str
    final: float
    bits: float
    lrs: Sequence[float] = (0.005, 0.01, 0.02, 0.04)
    best: int = 1
    compute_s: float = 0.11
    optimizer_s: float = 0.01
    exchange_s: float = 0.02
    diverged_seeds: Sequence[int] = ()
    chain: str = "mean -> momentum(0.95, nesterov) -> polar(newton_schulz, steps=5) -> scale(rms)"
    at_edge: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    diagnostics: Mapping[str, float | None] = field(default_factory=dict)


FOUR = (
    Made(
        recipe="adamw",
        final=3.62,
        bits=32.0,
        lrs=(0.0005, 0.001, 0.002, 0.004),
        best=2,
        optimizer_s=0.006,
        chain="mean -> adam(betas=(0.9, 0.95)) -> decay(0.1)",
    ),
    Made(recipe="muon", final=3.41, bits=32.0, best=2, optimizer_s=0.03, at_edge=False),
    Made(
        recipe="distro",
        final=3.74,
        bits=0.19,
        lrs=(0.0005, 0.001, 0.002, 0.004),
        best=3,
        at_edge=True,
        optimizer_s=0.02,
        exchange_s=0.05,
        chain="residual momentum(0.999)\n  + exchange(dct(chunk=64) | topk(k=32) | "
        "sign(scale=chunk))\n-> sign",
    ),
    Made(
        recipe="local_muon(interval=5)",
        final=3.46,
        bits=0.42,
        best=1,
        optimizer_s=0.031,
        exchange_s=0.008,
        options={"interval": 5, "outer_lr": 0.7},
        chain="inner: momentum(0.95) -> polar(newton_schulz, steps=5) -> scale(rms)\n"
        "every 5 steps: exchange(dct(chunk=64) | topk(k=32), feedback) of the weight change\n"
        "outer: momentum(0.8, nesterov)",
    ),
)


def make_setting(**changes: Any) -> ReportSetting:
    values: dict[str, Any] = {
        "title": "Four recipes on four replicas",
        "command": "muonwire compare --recipes adamw muon distro 'local_muon(interval=5)' --replicas 4 "
        "--steps 500 --seeds 0 1 2 --link 10mbit/50ms --out runs/demo",
        "task": "King James Bible, bytes paired to 1,024 tokens, next-token loss in nats",
        "model": "Llama, 4 layers of width 128, 1.2 M parameters",
        "replicas": 4,
        "steps": 500,
        "batch_terms": 8192,
        "lr_grid": {made.recipe: made.lrs for made in FOUR},
        "seeds": (0,),
        "link": "10mbit/50ms",
        "machine": "2 cores, 8 GB, Linux, no accelerator",
        "versions": {"muonwire": "0.1.0", "torch": "2.9.1", "python": "3.11.9"},
        "notes": ("Replicas are processes on one machine that talk over TCP.",),
    }
    return ReportSetting(**(values | changes))


def make_results(
    recipes: Sequence[Made] = FOUR,
    *,
    seeds: Sequence[int] = (0,),
    replicas: int = 4,
    steps: int = 500,
    spread: float = 0.015,
) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """Summary and curves of ``recipes``; a loss descends from ``START`` to ``final`` ± ``spread``."""
    summary, rows = [], []
    for made in recipes:
        for seed in seeds:
            for place, lr in enumerate(made.lrs):
                best = place == made.best
                rng = random.Random(f"{made.recipe}/{seed}/{place}")
                run = _run(
                    made,
                    seed=seed,
                    lr=lr,
                    off=place - made.best,
                    rng=rng,
                    steps=steps,
                    replicas=replicas,
                    spread=spread,
                )
                rows += [row | {"best": best} for row in run]
                if best:
                    summary.append(_summary(made, seed=seed, lr=lr, run=run, steps=steps, replicas=replicas))
    return summary, pl.DataFrame(rows, infer_schema_length=None)


def _costs(made: Made, *, replicas: int) -> tuple[float, float, float]:
    sent = made.bits * NUM_PARAMETERS / 8 if replicas > 1 else 0.0
    link = sent * (replicas - 1) * 8 / 10e6 + (0.1 if replicas > 1 else 0.0)
    return sent, link, made.compute_s + made.optimizer_s


def _run(
    made: Made,
    *,
    seed: int,
    lr: float,
    off: int,
    rng: random.Random,
    steps: int,
    replicas: int,
    spread: float,
) -> list[dict[str, Any]]:
    sent, link, compute = _costs(made, replicas=replicas)
    # Too high a rate hurts more than too low a one, and far too high a one diverges.
    final = made.final + (0.05 * off * off if off < 0 else 0.16 * off * off) + spread * (seed % 3 - 1)
    diverges = off >= 2 or (off == 0 and seed in made.diverged_seeds)
    rows = []
    for step in range(0, steps + 1, steps // 25):
        t = step / steps
        loss = final + (START - final) * math.exp(-7 * t) + (0.35 * (1 - t) * t) + rng.gauss(0, 0.006)
        if step == 0:
            loss = START + 0.001 * seed
        dead = diverges and t > 0.4
        if diverges and not dead:
            loss += 9 * max(0.0, t - 0.25)
        rows.append(
            {
                "recipe": made.recipe,
                "lr": lr,
                "seed": seed,
                "step": step,
                "train_loss": (None if dead else loss - 0.05) if step else None,
                "eval_loss": float("nan") if dead else final if step == steps else loss,
                "bytes_sent": sent * step,
                "bytes_received": sent * step * (replicas - 1),
                "bytes_egress": sent * step * (replicas - 1),
                "measured_s": (compute + made.exchange_s) * step,
                "link_s": (compute + link) * step,
            }
        )
    return rows


def _summary(
    made: Made, *, seed: int, lr: float, run: list[dict[str, Any]], steps: int, replicas: int
) -> dict[str, Any]:
    sent, link, _ = _costs(made, replicas=replicas)
    diverged = seed in made.diverged_seeds
    return {
        "recipe": made.recipe,
        "seed": seed,
        "lr": lr,
        "replicas": replicas,
        "steps": steps,
        "final_eval_loss": None if diverged else run[-1]["eval_loss"],
        "num_parameters": NUM_PARAMETERS,
        "bytes_sent_per_step": sent,
        "bytes_received_per_step": sent * (replicas - 1),
        "bytes_egress_per_step": sent * (replicas - 1),
        "messages_per_step": 1.0 if replicas > 1 else 0.0,
        "bits_per_parameter_step": made.bits if replicas > 1 else 0.0,
        "compute_s_per_step": made.compute_s,
        "optimizer_s_per_step": made.optimizer_s,
        "exchange_s_per_step": made.exchange_s,
        "link_s_per_step": link,
        "diverged": diverged,
        "options": made.options,
        "chain": made.chain,
        "lr_at_grid_edge": made.at_edge,
        "diagnostics": made.diagnostics,
    }
