"""The same model trained from the same start by several optimizers: what each leaves in its weights."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from muonwire import recipes
from muonwire.errors import NonFiniteUpdateError
from muonwire.lab import Input
from muonwire.lab.engine.input import plain, write_about
from muonwire.lab.inputs.runs import rate_course, side_by_side
from muonwire.optim import ChainOptimizer
from muonwire.tasks import TextSettings, TextTask
from muonwire.train.checkpoint import write_json
from muonwire.transport import SingleReplica, Transport, run_threads

ADAM, MUON, ONE_BIT = "Adam", "Muon", "one-bit Muon"
SGD, WEIGHTS = "SGD", "SGD, weights orthogonalized"
# One-bit Muon synchronizes every eleven steps.
POINTS, QUICK_POINTS = (0, 33, 110, 330), (0, 2)
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 1000
BATCH = 32
RESULTS = "results.json"
# The learning rate of what SGD is not for, embeddings and norms, which Adam trains.
REST_LR = 0.005


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How one optimizer is run.

    Args:
        recipe: as ``parse_recipe`` reads it; with ``rest``, its Adam part has a rate of its own.
        rates: learning rates that are tried on the tuning seed, as many for each optimizer.
        replicas: of the same joined batch.
        rest: whether REST_LR is the rate of its Adam part.
    """

    recipe: str
    rates: tuple[float, ...]
    replicas: int = 1
    rest: bool = False

    def build(self, model: nn.Module, lr: float, transport: Transport) -> ChainOptimizer:
        """The optimizer."""
        name, options = recipes.parse_recipe(self.recipe)
        if self.rest:
            options["adam_lr_ratio"] = REST_LR / lr
        return recipes.build(name, model, lr=lr, transport=transport, **options)


TRAINERS = {
    ADAM: Trainer(recipe="adamw", rates=(0.000438, 0.000875, 0.00175, 0.0035)),
    MUON: Trainer(recipe="muon", rates=(0.0035, 0.007, 0.014, 0.028)),
    ONE_BIT: Trainer(recipe="one_bit_muon", rates=(0.0035, 0.007, 0.014, 0.028), replicas=4),
    SGD: Trainer(recipe="sgd_weight_polar(period=0)", rates=(0.03, 0.1, 0.3, 1.0), rest=True),
    WEIGHTS: Trainer(recipe="sgd_weight_polar", rates=(0.03, 0.1, 0.3, 1.0), rest=True),
}


@cache
def task(replicas: int, quick: bool) -> TextTask:
    """The text task with the joined batch split over the replicas."""
    size, length, batch = ("pico", 16, 4) if quick else ("nano", 64, BATCH)
    return TextTask(
        TextSettings(
            model_size=size,
            sequence=length,
            batch=batch // replicas,
            evaluation_sequences=8 if quick else 128,
        )
    )


def points(quick: bool) -> tuple[int, ...]:
    """The steps at which weights are kept; the last one is a run's length."""
    return QUICK_POINTS if quick else POINTS


def _train(
    name: str, lr: float, seed: int, quick: bool, keep: Callable[[int, nn.Module], None] | None
) -> float:
    """The final evaluation loss, infinite where it diverged; ``keep`` is given the shared weights at the points."""
    trainer, steps = TRAINERS[name], points(quick)[-1]
    its_task = task(trainer.replicas, quick)

    def replica(rank: int, transport: Transport) -> float:
        model = its_task.build_model(seed=seed)
        optimizer = trainer.build(model, lr, transport)
        set_rates = rate_course(optimizer, steps=steps)
        if keep is not None and rank == 0:
            keep(0, model)
        for step in range(1, steps + 1):
            set_rates(step)
            batch = its_task.batch(seed=seed, step=step, rank=rank, world_size=trainer.replicas)
            loss = its_task.loss(model, batch)
            if not loss.isfinite():
                raise NonFiniteUpdateError(f"the loss of replica {rank} is {float(loss)} in step {step}")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if keep is not None and rank == 0 and step in points(quick):
                with optimizer.shared_weights():
                    keep(step, model)
        with optimizer.shared_weights():
            total, terms = its_task.evaluate(model, rank=0, world_size=1)
        return total / terms

    try:
        if trainer.replicas == 1:
            return replica(0, SingleReplica())
        return run_threads(lambda rank, transport: replica(rank, transport()), replicas=trainer.replicas)[0]
    except NonFiniteUpdateError:
        return math.inf


def weights_folder(folder: Path, name: str, *, seed: int, step: int) -> Path:
    """Where the model lies, as a folder of ``transformers``: ``muonwire spectra`` opens it."""
    slug = "".join(c if c.isalnum() else "_" for c in name.lower())
    return folder / f"{slug}_seed_{seed}" / f"step_{step:05d}"


def make(folder: Path, quick: bool) -> None:
    """Tune every optimizer, train it with every seed, and keep its weights; what is there is not repeated."""
    rates = {name: t.rates[:1] if quick else t.rates for name, t in TRAINERS.items()}
    seeds = SEEDS[:1] if quick else SEEDS
    tuned = _all(folder, quick, [(n, lr, TUNING_SEED) for n, its in rates.items() for lr in its])
    best = {n: min(its, key=lambda lr: tuned[n, lr, TUNING_SEED]) for n, its in rates.items()}
    losses = _all(folder, quick, [(n, lr, seed) for n, lr in best.items() for seed in seeds])
    write_json(
        folder / RESULTS,
        {
            n: {
                "lr": lr,
                "tried": {f"{r:g}": min(tuned[n, r, TUNING_SEED], 1e9) for r in rates[n]},
                "losses": {seed: min(losses[n, lr, seed], 1e9) for seed in seeds},
            }
            for n, lr in best.items()
        },
    )
    write_about(folder, identity(quick))


def identity(quick: bool) -> dict[str, object]:
    """What the runs are made with, as JSON has it."""
    made = {
        "trainers": {n: asdict(t) for n, t in TRAINERS.items()},
        "points": points(quick),
        "seeds": SEEDS,
        "batch": BATCH,
    }
    return plain(made)


OPTIMIZERS = Input(
    name="optimizers",
    about="the byte-level Llama (nano, 0.46 M parameters) trained on the King James text from the same start, "
    f"{BATCH} × 64 tokens a step, {POINTS[-1]} steps, by Adam, Muon, one-bit Muon on four replicas, and momentum SGD with "
    "and without orthogonalizing its weights (Adam for the embedding there); each at the best of four rates by a seed of its "
    "own; weights at " + ", ".join(map(str, POINTS)) + " steps",
    make=make,
    made_with=identity,
    seeds=len(SEEDS),
)


def _all(
    folder: Path, quick: bool, cases: list[tuple[str, float, int]]
) -> dict[tuple[str, float, int], float]:
    return dict(zip(cases, side_by_side(partial(_one, folder, quick), cases, quick=quick), strict=True))


def _one(folder: Path, quick: bool, case: tuple[str, float, int]) -> float:
    name, lr, seed = case
    record = weights_folder(folder, name, seed=seed, step=0).parent / f"lr_{lr:g}.json"
    if record.exists():
        loss: float = json.loads(record.read_text())["loss"]
        return loss

    from transformers.utils import logging

    logging.disable_progress_bar()

    def keep(step: int, model: nn.Module) -> None:
        model.save_pretrained(weights_folder(folder, name, seed=seed, step=step))  # type: ignore[operator]

    record.parent.mkdir(parents=True, exist_ok=True)
    loss = _train(name, lr, seed, quick, None if seed == TUNING_SEED else keep)
    write_json(record, {"optimizer": name, "lr": lr, "seed": seed, "loss": min(loss, 1e9)})
    return min(loss, 1e9)


def final_loss(folder: Path, name: str, *, seed: int) -> float:
    """Evaluation loss at the end, in nats a byte."""
    losses = json.loads((folder / RESULTS).read_text())[name]["losses"]
    return float(losses[str(seed)])


def trained(folder: Path, name: str, *, seed: int, quick: bool) -> Iterator[tuple[int, nn.Module]]:
    """The model at each of the kept steps."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    for step in points(quick):
        place = weights_folder(folder, name, seed=seed, step=step)
        yield step, AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
