"""future.3: orthogonalizing the weights now and then, with DisTrO."""

from muonwire.lab import Check, Claim, Reading, Row, Setting
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs import training

BASE = "distro(scale='chunk', subtract='decoded')"
VARIANTS = {
    "a tenth of the way, every 10 steps": "distro_weight_polar(period=10)",
    "a tenth of the way, every 60 steps": "distro_weight_polar(period=60)",
    "all the way, every 60 steps": "distro_weight_polar(period=60, strength=1.0)",
}
RECIPES = {**VARIANTS, "never": BASE, **training.REFERENCES}


def measure(setting: Setting) -> list[Row]:
    """DisTrO whose weights move towards their polar factors, beside the same without."""
    runs = training.Results.of(setting)
    costs: list[Row] = [
        {"weights": name, "cost": runs[recipe].over(runs[BASE])} for name, recipe in VARIANTS.items()
    ]
    return [*runs.rows(RECIPES), *costs]


CLAIM = Claim(
    id="future.3",
    note=NOTE,
    says="orthogonalizing the weights periodically, and not the gradients, might be compatible with DisTrO",
    question="With DisTrO, does moving the hidden weights towards their polar factors (of equal Frobenius norm), a tenth of the "
    "way or all of it, every 10 or 60 steps, cost more than 1 % of the final loss?",
    expected="Compatible where gentle: every replica holds the same weights and orthogonalizes them alone, so no "
    "byte is added, and a tenth of the way every 60 steps costs nothing. A tenth every 10 steps, or all the way, "
    "costs more, since trained weights are far from orthogonal for a reason.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=tuple(
        Check(
            setting=name,
            column="cost",
            select={"weights": name},
            at_most=1.0,
            possible=(-100.0, float("inf")),
            unit="%",
            reading=Reading(
                holds="it costs at most 1 % of the loss to move the weights",
                fails="it costs more than 1 % of the loss to move the weights",
                by="{mean} %",
                where=name,
            ),
        )
        for name in VARIANTS
    ),
    meaning={
        "confirmed": "Weights may be pulled towards their polar factors with DisTrO at no cost, often and fully.",
        "refuted": "Leave the weights alone: even pulling them gently and seldom costs loss with DisTrO.",
        "depends": "Choose strength and period by what each costs.",
    },
    tables=(training.OUTCOMES,),
    plots=(training.CURVES,),
)
