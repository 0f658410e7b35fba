"""vit.2: relative sizes of updates: the note's arithmetic from its own inputs, and what training gives."""

import math
from collections.abc import Iterator
from statistics import median

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.vision import NOTE
from muonwire.lab.inputs.vision_training import (
    METHODS,
    MUONFAST,
    VISION_RATES,
    training,
    tuned_rate,
    vision_task,
)

# The note's worked examples: (m, n), learning rate, factor of a scale, norm of the weight, and the percentage that it comes to.
EXAMPLES = {
    "ViT 64×64, first": ((64, 64), 3e-4, 1.0, 15.0, 1.6),
    "ViT 64×64, second": ((64, 64), 3e-4, 1.0, 13.0, 0.018),
    "ViT 64×64, scaled": ((64, 64), 3e-4, (64 / 256) ** 2, 13.0, 0.00115),
    "ResNet-50 512×4608": ((512, 4608), 1e-3, 1.0, 150.0, 0.015),
}
# What the note gives MuonFast, and what torch.optim.Adam takes by default.
NOTES_RATE, ADAM_DEFAULT = 3e-4, 1e-3
# The note asks for 0.01 % to 0.1 % of the weight, and finds MuonFast 10 to 100 times beyond Adam.
WANTED_PERCENT = (0.01, 0.1)
BEYOND = 10.0
THE_NOTES, TUNED = "the note's rates", "tuned rates"


def arithmetic() -> Iterator[Row]:
    """The examples, recomputed from their own inputs: √min(m, n) · lr · factor over the norm of the weight."""
    for name, ((m, n), lr, factor, weight, stated) in EXAMPLES.items():
        found = 100 * math.sqrt(min(m, n)) * lr * factor / weight
        yield {"example": name, "percent": found, "stated over found": stated / found}


def measure(setting: Setting) -> Iterator[Row]:
    """The arithmetic, and ‖ΔW‖/‖W‖ of the ViT's hidden matrices in training with MuonFast and with Adam."""
    yield from arithmetic()
    task = vision_task("vit", quick=setting.quick)
    folder = setting.input(VISION_RATES)
    steps, points = setting.pick((60, (1, 5, 15, 30, 60)), (2, (1, 2)))
    for rates in (THE_NOTES, TUNED):
        sizes: dict[str, float] = {}
        for method, notes in ((MUONFAST, NOTES_RATE), ("Adam", ADAM_DEFAULT)):
            lr = notes if rates == THE_NOTES else tuned_rate(folder, "vit", method)
            found = []
            run = training(task, METHODS[method].recipe, lr=lr, seed=setting.seed, steps=steps)
            for step in run:
                if step.number not in points:
                    continue
                relative = [float(c.norm() / step.weights[n].norm()) for n, c in step.changes.items()]
                found.append(100 * median(relative))
                yield {
                    "rates": rates,
                    "method": method,
                    "step": step.number,
                    "relative": found[-1],
                    "weight": median(float(w.norm()) for w in step.weights.values()),
                }
            sizes[method] = median(found)
            yield {"rates": rates, "method": method, "typical": sizes[method]}
        yield {"rates": rates, "muonfast over adam": sizes[MUONFAST] / sizes["Adam"]}


CLAIM = Claim(
    id="vit.2",
    note=NOTE,
    says="at a rate of 0.0003 an orthogonalized step of a 64 × 64 matrix is 1.6 % of the weight, 10 to 100 times "
    "what training wants, and on ResNet-50 it is a reasonable 0.015 %",
    quoted={
        "64×64": "0.0024/15 = 0.016 = 1.6 %",
        "512×4608": "22.6 · 0.001/150 = 0.015 %",
        "wanted": "0.01 % to 0.1 %",
        "too large by": "10 to 100 times",
    },
    question="What do the note's own inputs come to, and how large are the steps of MuonFast and of Adam relative "
    "to the weights in training?",
    expected="0.0024/15 is 0.00016, which is 0.016 %: the note is off by a hundred there, and right in its other examples, one "
    "of them for the same matrix. In training weights of this ViT have a norm near 4.4, not 13 or 15, and Adam's steps are per "
    "cents of them, so that MuonFast with the rate outside takes smaller steps than Adam, not larger ones.",
    measure=measure,
    inputs=(VISION_RATES,),
    repeats=3,
    checks=(
        *(
            Check(
                name="the stated percentage follows from the note’s inputs, within a tenth",
                setting=f"the note's arithmetic, {name}",
                column="stated over found",
                select={"example": name},
                at_least=0.9,
                at_most=1.1,
                unit="times",
                reading=Reading(
                    holds=f"the note’s {stated} for {layer} follows from {inputs}",
                    fails=f"the note’s {stated} for {layer} does not follow from {inputs}",
                    by="{mean} times what they give",
                ),
            )
            for name, layer, stated, inputs in (
                ("ViT 64×64, first", "the ViT", "1.6 %", "its own inputs"),
                ("ResNet-50 512×4608", "ResNet-50", "0.015 %", "them"),
            )
        ),
        *(
            Check(
                setting=f"in training at {rates}",
                column="muonfast over adam",
                select={"rates": rates},
                at_least=BEYOND,
                unit="times",
                reading=Reading(
                    holds="MuonFast’s relative step is at least 10 times Adam’s",
                    fails="MuonFast’s relative step is less than 10 times Adam’s",
                    where=f"at {rates}".replace("'", "’"),
                ),
            )
            for rates in (THE_NOTES, TUNED)
        ),
        Check(
            setting="in training at tuned rates",
            column="typical",
            select={"rates": TUNED, "method": "Adam"},
            at_least=WANTED_PERCENT[0],
            at_most=WANTED_PERCENT[1],
            possible=(0.0, math.inf),
            unit="%",
            reading=Reading(
                holds="Adam’s step is 0.01 % to 0.1 % of the weight",
                fails="Adam’s step is not 0.01 % to 0.1 % of the weight",
            ),
        ),
    ),
    meaning={
        "confirmed": "Orthogonalized steps are too large for small matrices at the usual rates; lower the rate.",
        "refuted": "Do not lower the rate because of these figures: they do not stand, and the steps are no larger than Adam’s.",
        "depends": "Compare ‖ΔW‖/‖W‖ of your own run with that of the Adam run it replaces before lowering a rate: the note’s "
        "1.6 % is off by a hundred.",
    },
    tables=(
        Pivot(
            caption="Relative step by the note's own inputs, %",
            rows={"example": "Example"},
            values={"percent": "Recomputed", "stated over found": "Stated over recomputed"},
            quoted={(name,): {"percent": f"{given[-1]:g}"} for name, given in EXAMPLES.items()},
        ),
        Pivot(
            caption="Relative step in training, median over the hidden matrices, %; the weights' norm is 13 to 15 in the note",
            rows={"rates": "Rates", "method": "Method", "step": "Step"},
            values={"relative": "‖ΔW‖/‖W‖, %", "weight": "‖W‖"},
        ),
    ),
    plots=(
        Plot(
            name="relative",
            title="Relative step in training, at tuned rates",
            how_to_read="Each line is the median over the hidden matrices of ‖ΔW‖/‖W‖ in a step.",
            x=("step", "step"),
            y=("relative", "‖ΔW‖/‖W‖, %"),
            series=("method", "Method"),
            log_y=True,
            select={"rates": TUNED},
        ),
    ),
)
