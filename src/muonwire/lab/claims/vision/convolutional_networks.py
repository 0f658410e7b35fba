"""vit.8: MuonFast works on large convolutional networks."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from muonwire.lab import Check, Claim, Pivot, Reading, Row, Setting
from muonwire.lab.claims.vision import (
    NOTE,
    at_tuned_rates,
    loss_bars,
    loss_check,
    validation_rows,
    validation_table,
)
from muonwire.lab.inputs.vision_training import (
    DESCRIBED,
    MUONFAST,
    STEPS,
    VISION_RATES,
    hidden,
    vision_task,
)

METHODS_COMPARED = ("Adam", "SGD", "GDA2", "Muon", MUONFAST, DESCRIBED)
# The note's example, its rate, and what its words ask for: a step close to Adam's, a network that works.
NOTES_LAYER = "512×4608"
NOTES_RATE = 1e-3
CLOSE = 3.0
WORKS = 0.9


def resnet50_shapes() -> list[tuple[int, int, int]]:
    """The distinct convolutions of ResNet-50, small to large: rows and columns as a matrix, and entries of a kernel."""
    from transformers import ResNetConfig, ResNetForImageClassification

    with torch.device("meta"):
        model = ResNetForImageClassification(ResNetConfig())
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    found = {(w.shape[0], math.prod(w.shape[1:]), math.prod(w.shape[2:])) for w in weights}
    return sorted(found, key=lambda s: (min(s[:2]), max(s[:2])))


def relative_step(m: int, n: int, weight: float) -> float:
    """√min(m, n) · lr / ‖W‖ at the note's rate, in per cent."""
    return 100 * math.sqrt(min(m, n)) * NOTES_RATE / weight


def measure(setting: Setting) -> Iterator[Row]:
    """Step sizes by ResNet-50's shapes, and validation losses of a small ResNet."""
    vit = vision_task("vit", quick=False).build_model(seed=setting.seed)
    square = next(r.param.detach() for r in hidden(vit) if r.param.shape == (64, 64))
    of_vit = relative_step(64, 64, float(square.norm()))
    generator = setting.generator()
    for m, n, kernel in resnet50_shapes():
        # Kaiming's normal initialization by outputs, the model's own.
        weight = float(torch.randn(m, n, generator=generator).norm()) * math.sqrt(2 / (m * kernel))
        yield {
            "layer": f"{m}×{n}",
            "weight": weight,
            "root": math.sqrt(min(m, n)),
            "relative": relative_step(m, n, weight),
            # The entries of Adam's first step are ±lr, so that its norm is lr √(m n).
            "over adam": math.sqrt(min(m, n) / (m * n)),
            "over vit": relative_step(m, n, weight) / of_vit,
        }
    outcomes = at_tuned_rates(setting, "resnet", METHODS_COMPARED)
    yield from validation_rows(outcomes, column="method")
    for name in (MUONFAST, DESCRIBED):
        yield {"method": name, "behind adam": outcomes[name][1].loss - outcomes["Adam"][1].loss}


def _works(method: str, rate: str, where: str) -> Check:
    return Check(
        setting=f"training a ResNet {rate}",
        column="accuracy",
        select={"method": method},
        at_least=WORKS,
        possible=(0.0, 1.0),
        reading=Reading(
            holds="MuonFast trains a small ResNet to an accuracy of 0.9",
            fails="MuonFast does not train a small ResNet to an accuracy of 0.9",
            where=where,
        ),
    )


CLAIM = Claim(
    id="vit.8",
    note=NOTE,
    says="MuonFast works on large convolutional networks: on ResNet-50’s 512 × 4608 layers the relative update is "
    "0.015 %, close to Adam’s",
    quoted={"√512": "22.6", "norm of the weight": "150", "relative update": "0.015 %"},
    question="How large is an orthogonalized step of ResNet-50’s layers relative to the weight and to Adam’s step, "
    "and does MuonFast train a ResNet on the same digits, as described and with the rate outside?",
    expected="With ResNet-50’s own initialization the weight’s norm is √(2 · 512) = 32, not 150, and the step at equal rates "
    "1/√4608 of Adam’s. The small ResNet trains with the rate outside. As described it may train too: behind a normalization "
    "steps too large make the weight grow until they are small.",
    measure=measure,
    inputs=(VISION_RATES,),
    repeats=3,
    checks=(
        Check(
            name="the relative step is smaller than that of the ViT’s 64×64",
            setting="512×4608 against the ViT",
            column="over vit",
            select={"layer": NOTES_LAYER},
            at_most=1.0,
            unit="times",
        ),
        Check(
            setting="512×4608 against Adam",
            column="over adam",
            select={"layer": NOTES_LAYER},
            at_least=1 / CLOSE,
            possible=(0.0, 1.0),
            unit="of Adam’s",
            reading=Reading(
                holds="a step of ResNet-50’s 512×4608 layer is at least a third of Adam’s",
                fails="a step of ResNet-50’s 512×4608 layer is less than a third of Adam’s",
                by="{mean} of it",
            ),
        ),
        _works(DESCRIBED, "as described, the rate inside", "with its rate inside"),
        _works(MUONFAST, "with the rate outside", "with its rate outside"),
        loss_check(
            setting="training a ResNet with the rate outside",
            column="behind adam",
            select={"method": MUONFAST},
            at_most=0.0,
            reading=Reading(
                holds="its loss with the rate outside is no higher than Adam’s",
                fails="its loss with the rate outside is higher than Adam’s",
                by="by {size} nats",
            ),
        ),
    ),
    meaning={
        "confirmed": "Use MuonFast on convolutional networks as it is.",
        "refuted": "MuonFast does not train a convolutional network either.",
        "depends": "Keep the rate outside on convolutional networks too, and scale by shape: equal rates give steps tens of "
        "times smaller than Adam’s.",
    },
    tables=(
        Pivot(
            caption="ResNet-50’s layers at their initialization: an orthogonalized step at a rate of 0.001",
            rows={"layer": "Layer"},
            values={
                "weight": "‖W‖",
                "root": "√min(m, n)",
                "relative": "‖ΔW‖/‖W‖, %",
                "over adam": "Over Adam’s",
                "over vit": "Over the ViT’s 64×64",
            },
            quoted={(NOTES_LAYER,): {"weight": "150", "root": "22.6", "relative": "0.015"}},
        ),
        validation_table(
            f"Validation of a ResNet of 309 K parameters after {STEPS} steps of 128 digits, each method at the best of "
            "five rates",
            rows={"method": "Method"},
            lr="Rate",
        ),
    ),
    plots=(loss_bars("methods", title="Validation loss of the ResNet by method", by=("method", "Method")),),
)
