"""Training of the small vision models: the methods that claims compare, their rates tuned alike, and what each step did."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from muonwire import recipes
from muonwire.lab import Input
from muonwire.lab.engine.input import write_about
from muonwire.lab.inputs.runs import rate_course, side_by_side
from muonwire.optim import Route, route
from muonwire.tasks import Batch, VisionSettings, VisionTask
from muonwire.train.checkpoint import write_json

STEPS = 150
QUICK_STEPS = 2
# Tuning uses a seed that no claim's repeats use.
TUNING_SEED = 1000
# Every method is tried at as many rates, its centre times these.
RATE_FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
# A loss beyond this, or one that is not finite, counts as this; chance is log 10 = 2.3.
WORST_LOSS = 10.0
# Patch and position embeddings, the class token and a ResNet's first convolution are not hidden matrices.
NOT_HIDDEN = ["embed"]
RATES = "rates.json"


@dataclass(frozen=True, kw_only=True)
class Method:
    """An optimizer that takes part in comparisons.

    Args:
        recipe: as ``muonwire.recipes.parse_recipe`` reads it.
        centre: the middle of the learning rates that are tried: what such a method is usually run with.
        models: on which it is tuned.
    """

    recipe: str
    centre: float
    models: tuple[str, ...] = ("vit",)


def _muonfast(**options: object) -> str:
    return recipes.format_recipe("muonfast", {"adam": NOT_HIDDEN, **options})


BOTH = ("vit", "resnet")
DESCRIBED = "MuonFast, rate inside"
MUONFAST = "MuonFast, rate outside"
# The rate of what is not orthogonalized is kept near the centre of MuonFast's, whatever the size of the updates of hidden matrices.
METHODS = {
    "Adam": Method(recipe="adamw", centre=3e-3, models=BOTH),
    "SGD": Method(recipe="sgd", centre=0.1, models=BOTH),
    "GDA2": Method(recipe="gda2", centre=3e-3, models=BOTH),
    "Muon": Method(recipe=recipes.format_recipe("muon", {"adam": NOT_HIDDEN}), centre=0.01, models=BOTH),
    MUONFAST: Method(recipe=_muonfast(), centre=0.02, models=BOTH),
    # Only the rest's rate is tuned here: inside the polar factor the rate cancels.
    DESCRIBED: Method(recipe=_muonfast(rate_inside=True), centre=0.02, models=BOTH),
    "dimension-aware scale": Method(recipe=_muonfast(scale="small", adam_lr_ratio=1 / 16), centre=0.3),
    "Adam's denominator before": Method(recipe=_muonfast(preconditioner="before"), centre=0.02),
    "Adam's denominator after": Method(
        recipe=_muonfast(preconditioner="after", adam_lr_ratio=6.0), centre=3e-3
    ),
    "matrices under 128 left alone": Method(recipe=_muonfast(polar_at_least=128), centre=0.03),
    "original magnitude kept": Method(recipe=_muonfast(keep_norm=True), centre=0.03),
    "all three": Method(
        recipe=_muonfast(preconditioner="before", polar_at_least=128, keep_norm=True, adam_lr_ratio=6.0),
        centre=3e-3,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a training run, after it was taken.

    Args:
        number: the first is 1.
        loss: over the batch, before the step, in nats.
        model: after the step.
        batch: what it trained on.
        gradients, weights, changes: of the hidden matrices, as matrices, by name: the gradient, the weight before the step, and
            what the step added to it.
    """

    number: int
    loss: float
    model: nn.Module
    batch: Batch
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    changes: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to.

    Args:
        loss: over the validation images, in nats; at most WORST_LOSS.
        accuracy: over them, in [0, 1].
        decrease: of the training loss, from the mean of the first tenth of the steps to that of the last, per step.
    """

    loss: float
    accuracy: float
    decrease: float


def hidden(model: nn.Module) -> list[Route]:
    """The hidden matrices, as the methods treat them."""
    return route(model, adam=NOT_HIDDEN).polar


def vision_task(model: str, *, quick: bool) -> VisionTask:
    """The task of a model, "vit" or "resnet"; a small one where it is quick."""
    if quick:
        return VisionTask(VisionSettings(model=f"{model}_pico", batch=16, evaluation_images=32))
    return VisionTask(VisionSettings(model=model))


def bounded(loss: float) -> float:
    """A loss as it counts; see WORST_LOSS."""
    return min(loss, WORST_LOSS) if math.isfinite(loss) else WORST_LOSS


def training(task: VisionTask, recipe: str, *, lr: float, seed: int, steps: int) -> Iterator[Step]:
    """The steps of a run, one after the other; it ends early where the loss is not finite.

    The rate goes as ``rate_course`` has it.

    Args:
        task: data and model.
        recipe: with its options, as text.
        lr: peak learning rate.
        seed: of weights, data order and dropout.
        steps: how many.
    """
    model = task.build_model(seed=seed)
    torch.manual_seed(seed)
    name, options = recipes.parse_recipe(recipe)
    optimizer = recipes.build(name, model, lr=lr, **options)
    set_rates = rate_course(optimizer, steps=steps)
    routes = hidden(model)
    for number in range(1, steps + 1):
        set_rates(number)
        batch = task.batch(seed=seed, step=number, rank=0, world_size=1)
        loss = task.loss(model, batch)
        if not loss.isfinite():
            return
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        before = as_matrices(routes, {r.name: r.param.detach().clone() for r in routes})
        gradients = as_matrices(routes, {r.name: _gradient(r.param) for r in routes})
        optimizer.step()
        after = as_matrices(routes, {r.name: r.param.detach() for r in routes})
        yield Step(
            number=number,
            loss=float(loss.detach()),
            model=model,
            batch=batch,
            gradients=gradients,
            weights=before,
            changes={n: after[n] - w for n, w in before.items()},
        )


def finish(task: VisionTask, losses: list[float], model: nn.Module, *, wanted: int) -> Outcome:
    """What a run came to.

    Args:
        task: of the run.
        losses: of its steps.
        model: at its end.
        wanted: steps that it was to have; it diverged where there are fewer.
    """
    part = max(len(losses) // 10, 1)
    if len(losses) < wanted:
        return Outcome(loss=WORST_LOSS, accuracy=1 / task.num_classes, decrease=0.0)
    total, terms = task.evaluate(model, rank=0, world_size=1)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    return Outcome(
        loss=bounded(total / terms),
        accuracy=task.accuracy(model),
        decrease=(bounded(first) - bounded(last)) / len(losses),
    )


def train(task: VisionTask, recipe: str, *, lr: float, seed: int, steps: int) -> Outcome:
    """A whole run; see ``training``."""
    taken = []
    model = nn.Module()
    for step in training(task, recipe, lr=lr, seed=seed, steps=steps):
        taken.append(step.loss)
        model = step.model
    return finish(task, taken, model, wanted=steps)


def as_matrices(routes: list[Route], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the hidden parameters as the matrices that are orthogonalized."""
    split = {r.name: r.layout.split(tensors[r.name]) for r in routes}
    return {name: matrices for name, (matrices,) in split.items()}


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def tuned_factors(quick: bool) -> tuple[float, ...]:
    """What the centre of a method's rates is multiplied by; one where it is quick."""
    return RATE_FACTORS[:1] if quick else RATE_FACTORS


def make(folder: Path, quick: bool) -> None:
    """Train every method at each of its rates with the tuning seed; its runs are kept in ``folder``.

    The rate with the lowest validation loss is a method's rate wherever claims compare methods.
    """
    factors = tuned_factors(quick)
    cases = [
        (model, name, method.centre * factor)
        for name, method in METHODS.items()
        for model in method.models
        for factor in factors
    ]
    steps = QUICK_STEPS if quick else STEPS
    outcomes = side_by_side(partial(_tuning_run, folder, steps, quick), cases, quick=quick)
    best: dict[str, dict[str, tuple[float, float]]] = {}
    for (model, name, lr), outcome in zip(cases, outcomes, strict=True):
        of_model = best.setdefault(model, {})
        of_model[name] = min(of_model.get(name, (math.inf, lr)), (outcome["loss"], lr))
    write_json(folder / RATES, {m: {n: lr for n, (_, lr) in of.items()} for m, of in best.items()})
    write_about(folder, {"seed": TUNING_SEED, "steps": steps, "runs": len(cases)})


VISION_RATES = Input(
    name="vision-rates",
    about="learning rates of the vision methods: each tried at five, a factor 3 apart around what it is usually run with, "
    "the best by validation loss on a seed of its own",
    make=make,
)


def _tuning_run(folder: Path, steps: int, quick: bool, case: tuple[str, str, float]) -> dict[str, float]:
    model, name, lr = case
    slug = "".join(c if c.isalnum() else "-" for c in f"{model} {name} {lr:.3g}")
    path = folder / f"{slug}.json"
    if not path.exists():
        task = vision_task(model, quick=quick)
        outcome = train(task, METHODS[name].recipe, lr=lr, seed=TUNING_SEED, steps=steps)
        write_json(path, {"model": model, "method": name, "lr": lr, **asdict(outcome)})
    kept: dict[str, float] = json.loads(path.read_text())
    return kept


def tuned_rate(folder: Path, model: str, method: str) -> float:
    """The rate that tuning found.

    Args:
        folder: of the input "vision-rates".
        model: "vit" or "resnet".
        method: a key of METHODS.
    """
    return float(json.loads((folder / RATES).read_text())[model][method])


def compare(
    model: str, methods: Sequence[str], folder: Path, *, seed: int, steps: int, quick: bool
) -> dict[str, tuple[float, Outcome]]:
    """What each method comes to at its tuned rate.

    Args:
        model: "vit" or "resnet".
        methods: keys of METHODS.
        folder: of the input "vision-rates".
        seed: of the runs.
        steps: of each.
        quick: whether the model is small.

    Returns:
        By method: its rate, and the outcome.
    """
    task = vision_task(model, quick=quick)
    outcomes = {}
    for name in methods:
        lr = tuned_rate(folder, model, name)
        outcomes[name] = lr, train(task, METHODS[name].recipe, lr=lr, seed=seed, steps=steps)
    return outcomes
