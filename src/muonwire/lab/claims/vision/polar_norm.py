"""vit.1: a polar factor has Frobenius norm √min(m, n) whatever the gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.vision import NOTE
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from muonwire.lab.inputs.samples import dealt
from muonwire.lab.inputs.vision_training import METHODS, VISION_RATES, training, tuned_rate, vision_task
from muonwire.lab.measures.matrices import polar_factor
from muonwire.polar import polar

NOTES_SHAPES = ((64, 64), (192, 64), (128, 64))
# How near "≈ 8.0" is meant to be, as a share of the norm.
NEAR = 0.1
KINDS = {
    "Gaussian": "Gaussian",
    "ViT gradients": "vision",
    "ResNet gradients": "vision",
    "language model gradients": "language",
}


def _rows(x: Tensor, data: str, layer: str) -> list[Row]:
    root = min(x.shape[-2:]) ** 0.5
    ratios = {
        "exact": float(polar_factor(x).norm()) / root,
        "five iterations": float(polar(x, method="newton_schulz", schedule="jordan").norm()) / root,
    }
    return [
        {
            "data": data,
            "kind": KINDS[data],
            "layer": layer,
            "method": method,
            "norm": ratio * root,
            "root": root,
            "ratio": ratio,
            "distance": abs(ratio - 1),
        }
        for method, ratio in ratios.items()
    ]


def measure(setting: Setting) -> Iterator[Row]:
    """Norms of polar factors of Gaussian matrices of three sizes, and of gradients of a ViT, a ResNet and a language model."""
    generator = setting.generator()
    for m, n in NOTES_SHAPES:
        for size in (1e-6, 1.0, 1e6):
            x = size * torch.randn(m, n, generator=generator)
            yield from _rows(x, "Gaussian", f"{m}×{n}, entries {size:g}")
    rates = setting.input(VISION_RATES)
    for model, data in (("vit", "ViT gradients"), ("resnet", "ResNet gradients")):
        task = vision_task(model, quick=setting.quick)
        points = setting.pick((1, 10, 40), (1, 2))
        lr = tuned_rate(rates, model, "Muon")
        for step in training(task, METHODS["Muon"].recipe, lr=lr, seed=setting.seed, steps=points[-1]):
            if step.number in points:
                for name, gradient in step.gradients.items():
                    yield from _rows(gradient, data, name)
    found = list(captured(setting.input(LANGUAGE_MODEL), kind="gradient"))
    for one in dealt(setting, found, num_parts=3):
        yield from _rows(one.matrix, "language model gradients", one.layer)


# How the answer says what holds and what fails, by the method; and of which matrices.
WORDS = {
    "exact": (
        "the exact polar factor has the norm √min(m, n) within a tenth",
        "the exact polar factor does not have the norm √min(m, n) within a tenth",
    ),
    "five iterations": (
        "five iterations come within a tenth of it",
        "five iterations do not come within a tenth of it",
    ),
}
WHERE = {"vision": "on gradients of a ViT and a ResNet", "language": "on gradients of a language model"}


def _check(kind: str, setting: str, method: str) -> Check:
    holds, fails = WORDS[method]
    return Check(
        name="its norm is within a tenth of √min(m, n)",
        setting=f"{setting}, {method}",
        column="distance",
        select={"kind": kind, "method": method},
        at_most=NEAR,
        possible=(0.0, 2.0),
        unit="of it",
        reading=Reading(holds=holds, fails=fails, by="off by {mean}", where=WHERE[kind])
        if kind in WHERE
        else None,
    )


CLAIM = Claim(
    id="vit.1",
    note=NOTE,
    says="the Frobenius norm of an orthogonalized update is √min(m, n), about 8 for a ViT's matrices of 64 × 64, "
    "192 × 64 and 128 × 64, no matter how large the gradient is",
    quoted={"64×64": "8.0", "192×64": "8.0", "128×64": "8.0", "512×4608": "22.6"},
    question="What is the norm of the polar factor, exact and after five of Jordan’s iterations, of each layer's gradient?",
    expected="√min(m, n) for the exact factor of a matrix of full rank. Iterations leave small singular values below 1, so that "
    "of a gradient whose spectrum falls steeply the norm is less; how large the gradient is does not matter.",
    measure=measure,
    inputs=(VISION_RATES, LANGUAGE_MODEL),
    repeats=3,
    checks=tuple(
        _check(kind, setting, method)
        for kind, setting in (
            ("Gaussian", "as in the note"),
            ("vision", "on gradients of the ViT and the ResNet"),
            ("language", "on gradients of a language model"),
        )
        for method in ("exact", "five iterations")
    ),
    meaning={
        "confirmed": "Choose the scale of a Muon step by shape, and the rate as a share of the weight.",
        "refuted": "Do not count on √min(m, n): measure the size of your updates.",
        "depends": "Take more iterations, or a schedule for the measured spectrum, where a few give less than √min(m, n): layers "
        "whose gradient's spectrum falls steeply take smaller steps than the formula says.",
    },
    tables=(
        Pivot(
            caption="Norm of the polar factor over √min(m, n)",
            rows={"data": "Matrices", "method": "Method"},
            values={"ratio": "Norm over √min(m, n)", "distance": "Distance from 1"},
        ),
        Pivot(
            caption="Gaussian matrices of the note's shapes",
            rows={"layer": "Shape and size"},
            values={"norm": "Norm, exact"},
            select={"data": "Gaussian", "method": "exact"},
            quoted={(f"{m}×{n}, entries 1",): {"norm": "8.0"} for m, n in NOTES_SHAPES},
        ),
    ),
    plots=(
        Plot(
            name="norm",
            title="Norm of the polar factor over √min(m, n)",
            how_to_read="1 is the note's formula. Thin lines are 95 % intervals over the seeds.",
            x=("data", "Matrices"),
            y=("ratio", "norm over √min(m, n)"),
            series=("method", "Method"),
            mark="bar",
        ),
    ),
)
