"""vit.6: the three fixes of MuonFast, each alone and together."""

from muonwire.lab.claims.vision import NOTE
from muonwire.lab.engine.check import Check, Row
from muonwire.lab.engine.claim import Claim, Setting
from muonwire.lab.engine.show import Pivot, Plot
from muonwire.lab.inputs.vision_training import MUONFAST, STEPS, VISION_RATES, WORST_LOSS, compare

FIXES = (
    "Adam's denominator before",
    "Adam's denominator after",
    "matrices under 128 left alone",
    "original magnitude kept",
    "all three",
)


def measure(setting: Setting) -> list[Row]:
    """Validation loss of MuonFast with the rate outside, and with each fix, at their tuned rates."""
    outcomes = compare(
        "vit",
        (MUONFAST, *FIXES),
        setting.input(VISION_RATES),
        seed=setting.seed,
        steps=setting.pick(STEPS, 2),
        quick=setting.quick,
    )
    rows: list[Row] = [
        {"fix": name, "lr": lr, "loss": o.loss, "accuracy": o.accuracy} for name, (lr, o) in outcomes.items()
    ]
    without = outcomes[MUONFAST][1].loss
    rows += [{"fix": name, "gain": without - outcomes[name][1].loss} for name in FIXES]
    return rows


CLAIM = Claim(
    id="vit.6",
    note=NOTE,
    says="to work on a ViT, MuonFast needs Adam’s denominator, or to leave matrices under 128 alone, or to keep "
    "the magnitude of the update",
    question="How much does each fix, and all together, lower the validation loss below that of MuonFast with the "
    "rate outside, each at its own tuned rate?",
    expected="Not by much, or not at all: what fails is the rate inside the polar factor. Leaving all matrices "
    "under 128 alone makes the whole of this ViT momentum SGD, and all three together make it Adam with momentum "
    "SGD for what is no hidden matrix.",
    measure=measure,
    inputs=(VISION_RATES,),
    repeats=3,
    checks=tuple(
        Check(
            name="the fix lowers the validation loss",
            setting=f"with {fix}" if fix == "all three" else f"with the fix “{fix}”",
            column="gain",
            select={"fix": fix},
            at_least=0.0,
            possible=(-WORST_LOSS, WORST_LOSS),
            unit="nats",
        )
        for fix in FIXES
    ),
    meaning={
        "confirmed": "Apply these fixes to Muon on small transformers.",
        "refuted": "With the rate outside, Muon on a small ViT needs none of these fixes; each makes it worse.",
        "depends": "With the rate outside, some of these fixes help and some harm; the table says which. None is "
        "needed to train.",
    },
    tables=(
        Pivot(
            caption=f"Validation after {STEPS} steps at tuned rates",
            rows={"fix": "Fix"},
            values={"loss": "Loss", "accuracy": "Accuracy", "gain": "Gain over MuonFast", "lr": "Rate"},
        ),
    ),
    plots=(
        Plot(
            name="fixes",
            title="Validation loss with each fix",
            how_to_read="Lower is better. Thin lines are 95 % intervals over the seeds.",
            x=("fix", "Fix"),
            y=("loss", "validation loss"),
            mark="bar",
        ),
    ),
)
