"""Training that claims read: one comparison of recipes, run once for all of them."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from muonwire.compare import CompareConfig
from muonwire.compare.comparison import RESULTS, SUMMARY
from muonwire.compare.runs import pending
from muonwire.compare.summary import curves, summarize
from muonwire.compare.virtual import run_virtual
from muonwire.errors import UsageError
from muonwire.lab import Check, Input, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.engine.input import plain, write_about
from muonwire.tasks.text import BYTES
from muonwire.train.checkpoint import write_json

# About a quarter of dense traffic, as much as approach D sends on the text task's model.
WIDE = "dct(chunk=64) | topk(k=1024) | float32"
RECIPES = (
    "muon",
    "muon(momentum=0.0)",
    "muon(adam=['mlp'])",
    "muon(adam=['self_attn'])",
    "adamw",
    "sgd",
    "sgd(momentum=0.0)",
    "distro",
    "distro(scale='chunk', subtract='decoded')",
    "distro(decay=0.0)",
    "approach_a",
    "approach_a(momentum=0.0)",
    f"approach_a(codec='{WIDE}')",
    "approach_b",
    "approach_b(server=True)",
    "approach_b(residual_decay=0.0)",
    f"approach_b(codec='{WIDE}')",
    "approach_c",
    f"approach_c(codec='{WIDE}')",
    "approach_d",
    "approach_e",
    "approach_e(rank=13)",
    "approach_f",
    "approach_f(period=3)",
    "approach_f(period=50)",
    "ef14_muon",
    "pre_polar",
    "one_bit_muon",
    "distro_weight_polar(period=10)",
    "distro_weight_polar(period=60)",
    "distro_weight_polar(period=60, strength=1.0)",
    "dion(fraction=1.0)",
    "dion(fraction=0.5)",
    "dion",
    "dion(fraction=0.125)",
)
# What approaches are held against, under the page's names.
REFERENCES = {"DisTrO alone": "distro", "dense Muon": "muon"}
NATS = "nats a token"
# With the first seed only, and at one rate in full: no check rests on more than their bytes.
SCREENED = ("approach_b(server=True)", "pre_polar")
SEEDS = tuple(range(8))
STEPS, TUNE_STEPS = 150, 30
# From what signs want to what plain gradients want; short runs search it from the middle outwards.
LR_GRID = tuple(0.016 * 2.0**k for k in range(-8, 9))


def settings(out: Path, *, quick: bool) -> CompareConfig:
    """The comparison.

    Args:
        out: its folder; what is finished there is not repeated.
        quick: two steps at one rate with the first seed, and tiny batches.
    """
    size = (
        {"replicas": 2, "sequence": 16, "batch": 1, "steps": 2, "lr_grid": (0.016,), "seeds": SEEDS[:1]}
        if quick
        else {
            "replicas": 4,
            "sequence": 64,
            "batch": 8,
            "steps": STEPS,
            "tune_steps": TUNE_STEPS,
            "lr_grid": LR_GRID,
            "seeds": SEEDS,
        }
    )
    return CompareConfig(
        recipes=RECIPES,
        finalists=tuple(r for r in RECIPES if r not in SCREENED),
        model_size="pico",
        evaluate_every=2 if quick else 50,
        link="10mbit/50ms",
        out=out,
        virtual=True,
        **size,  # type: ignore[arg-type]
    )


# Options for texts and models of the user's.
OTHER_MODELS = ("dataset", "split", "column", "model", "dtype", "lora", "checkpoint_activations")


def identity(quick: bool) -> dict[str, Any]:
    """What the comparison is made with, as JSON has it."""
    made_with = asdict(settings(Path(), quick=quick))
    # Where it lies, and what has no part in these runs.
    for name in ("out", "peers", "emulate", "emulate_recipes", "sites", *OTHER_MODELS):
        del made_with[name]
    return plain(made_with | {"tokenizer": BYTES})


def make(folder: Path, quick: bool) -> None:
    """Do what is missing of the comparison, and write its tables; a run that was cut off goes on."""
    config = settings(folder, quick=quick).resolve()
    if pending(config):
        run_virtual(config)
    write_json(folder / SUMMARY, summarize(config))
    curves(config).write_parquet(folder / RESULTS)
    write_about(folder, identity(quick))


TRAINING = Input(
    name="training",
    about="training runs on the King James text, byte by byte: Llama of 0.12 M parameters (pico), 4 replicas of "
    f"8 × 64 tokens a step, {STEPS} steps, {len(SEEDS)} seeds of start and data; the rate of every recipe from one grid of "
    f"factors of two, tried in runs of {TUNE_STEPS} steps, the best and the two next lower ones in full with the first seed; "
    f"{' and '.join(SCREENED)} with the next lower one and the first seed only",
    make=make,
    made_with=identity,
    seeds=len(SEEDS),
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A recipe at its best rate, one seed.

    Args:
        recipe: with its options.
        lr: the rate.
        loss: final evaluation loss, nats a token; NaN where it diverged.
        bits: sent per parameter and step.
        sent_bytes, egress_bytes: a replica and step: payloads, and copies of them that leave for the peers.
        optimizer_ms: a step, codecs included, without exchanges.
        alignment: cosine of the weights' change with dense Muon's update; see ``muonwire.train.diagnostics``.
        effective_rank: of the weights' change, as a share of the smaller dimension.
        curve: evaluation loss by step.
    """

    recipe: str
    lr: float
    loss: float
    bits: float
    sent_bytes: float
    egress_bytes: float
    optimizer_ms: float
    alignment: float
    effective_rank: float
    curve: tuple[tuple[int, float], ...]

    def over(self, other: "Trained") -> float:
        """How far its loss lies above the other's, in percent."""
        return 100 * (self.loss / other.loss - 1)

    def below(self, other: "Trained") -> float:
        """How far its loss lies below the other's, in nats a token: what changing the other into it gains."""
        return other.loss - self.loss


def share_of_gain(part: Trained, *, start: Trained, end: Trained) -> float:
    """100 · (L(start) − L(part)) / (L(start) − L(end)): percent of a gain that a part gives; NaN without a gain."""
    whole = end.below(start)
    return 100 * part.below(start) / whole if whole else math.nan


class Results:
    """What the comparison came to with one seed.

    Args:
        folder: of the input.
        seed: one of those that trained.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        points = pl.read_parquet(folder / RESULTS).filter(pl.col("best") & (pl.col("seed") == seed))
        entries = json.loads((folder / SUMMARY).read_text())
        self._runs = {
            e["recipe"]: _trained(e, points.filter(pl.col("recipe") == e["recipe"]))
            for e in entries
            if e["seed"] == seed
        }

    @classmethod
    def of(cls, setting: Setting) -> "Results":
        """Those of the seed that is measured."""
        return cls(setting.input(TRAINING), seed=setting.seed)

    def __getitem__(self, recipe: str) -> Trained:
        """The run of a recipe.

        Raises:
            UsageError: it was not trained.
        """
        if recipe not in self._runs:
            raise UsageError(
                f"lab: no training run of {recipe!r}; allowed are {', '.join(self._runs)}, or add it to RECIPES"
            )
        return self._runs[recipe]

    def __contains__(self, recipe: str) -> bool:
        """Whether it was trained with this seed; those that are only screened have the first one."""
        return recipe in self._runs

    def rows(self, recipes: Mapping[str, str]) -> list[Row]:
        """A row of figures for each recipe, under the page's name for it, and one for each point of its curve."""
        muon, distro = self["muon"], self["distro"]
        rows: list[Row] = []
        for name, recipe in recipes.items():
            if recipe in SCREENED and recipe not in self:
                continue
            run = self[recipe]
            rows.append(
                {
                    "recipe": name,
                    "loss": run.loss,
                    "over_muon": run.over(muon),
                    "over_distro": run.over(distro),
                    "bits": run.bits,
                    "optimizer_ms": run.optimizer_ms,
                    "added_ms": run.optimizer_ms - distro.optimizer_ms,
                    "alignment": run.alignment,
                    "effective_rank": run.effective_rank,
                    "lr": run.lr,
                }
            )
            rows += [{"recipe": name, "step": step, "evaluation": loss} for step, loss in run.curve]
        return rows


def _trained(entry: Mapping[str, Any], curve: pl.DataFrame) -> Trained:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Trained(
        recipe=entry["recipe"],
        lr=entry["lr"],
        loss=number(entry["final_eval_loss"]),
        bits=entry["bits_per_parameter_step"],
        sent_bytes=entry["bytes_sent_per_step"],
        egress_bytes=entry["bytes_egress_per_step"],
        optimizer_ms=1000 * entry["optimizer_s_per_step"],
        alignment=number(entry["diagnostics"].get("alignment")),
        effective_rank=number(entry["diagnostics"].get("effective_rank")),
        curve=tuple(curve.sort("step").select("step", "eval_loss").iter_rows()),
    )


OUTCOMES = Pivot(
    caption="Each at its best rate. Loss in nats a token; optimizer time in ms a step, without exchanges, the runs side by side",
    rows={"recipe": "Recipe"},
    values={
        "loss": "Final loss",
        "over_muon": "Above dense Muon, %",
        "over_distro": "Above DisTrO alone, %",
        "bits": "Bits a parameter and step",
        "optimizer_ms": "Optimizer",
        "added_ms": "Added to DisTrO’s",
        "lr": "Rate",
    },
)
CURVES = Plot(
    name="loss",
    title="Loss against steps",
    how_to_read="Evaluation loss of the shared weights, each recipe at its best rate. Bands are 95 % intervals over the seeds.",
    x=("step", "Step"),
    y=("evaluation", "Evaluation loss, nats a token"),
    series=("recipe", "Recipe"),
)
GAINS = Pivot(
    caption="What each change gains in final loss, nats a token; below zero it costs",
    rows={"change": "Change"},
    values={"gain": "Gain"},
)


def gain(change: str, *, of: Trained, over: Trained) -> Row:
    """A row of ``GAINS``: how far the loss of one recipe lies below another's."""
    return {"change": change, "gain": of.below(over)}


def gain_check(
    *, setting: str, change: str, below: str, above: str, where: str = "", helps: bool = True
) -> Check:
    """A check on a row of ``GAINS``.

    Args:
        setting: where it is measured.
        change: whose gain.
        below, above: clauses for the answer where the change lowers and where it raises the loss.
        where: the clauses' end; see ``Reading``.
        helps: the gain is at least zero; otherwise at most zero.
    """
    holds, fails = (below, above) if helps else (above, below)
    return Check(
        setting=setting,
        column="gain",
        select={"change": change},
        at_least=0.0 if helps else None,
        at_most=None if helps else 0.0,
        unit=NATS,
        reading=Reading(holds=holds, fails=fails, by=f"{{size}} {NATS}", where=where),
    )


def lead_check(
    *,
    setting: str,
    column: str,
    select: Mapping[str, Value],
    ahead: str,
    behind: str,
    where: str = "",
    unit: str = NATS,
) -> Check:
    """A check that one thing gains at least as much as another.

    Args:
        setting: where it is measured.
        column: by how much it gains more, in ``unit``.
        select: the rows that take part.
        ahead, behind: clauses for the answer where it gains more and where it gains less.
        where: the clauses' end; see ``Reading``.
        unit: of the column. Default: nats a token.
    """
    return Check(
        setting=setting,
        column=column,
        select=select,
        at_least=0.0,
        unit=unit,
        reading=Reading(holds=ahead, fails=behind, by=f"by {{size}} {unit}", where=where),
    )


def instead_of_distro(approach: str, runs: Results, recipe: str) -> Row:
    """A row of ``GAINS``: what an approach gains over DisTrO alone."""
    return gain(f"{approach} instead of DisTrO alone", of=runs[recipe], over=runs["distro"])


def below_distro_check(approach: str, *, setting: str = "in training against DisTrO alone") -> Check:
    """The check on a row of ``instead_of_distro``: the approach gains."""
    return gain_check(
        setting=setting,
        change=f"{approach} instead of DisTrO alone",
        below=f"in training approach {approach} ends below DisTrO alone",
        above=f"in training approach {approach} ends above DisTrO alone",
    )


def half_way_check(subject: str, *, setting: str, select: Mapping[str, Value]) -> Check:
    """A check on a column ``loss_share``: at least half of the gain of dense Muon over DisTrO alone.

    Args:
        subject: what goes the way, for the answer.
        setting: where it is measured.
        select: the rows that take part.
    """
    return Check(
        setting=setting,
        column="loss_share",
        select=select,
        at_least=50.0,
        unit="%",
        reading=Reading(
            holds=f"{subject} goes at least half of the way to dense Muon",
            fails=f"{subject} goes less than half of the way to dense Muon",
            by="{mean} %",
        ),
    )
