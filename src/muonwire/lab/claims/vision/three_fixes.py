"""vit.6: the three fixes of MuonFast, each alone and together."""

from collections.abc import Iterator

from muonwire.lab import Check, Claim, Reading, Row, Setting
from muonwire.lab.claims.vision import (
    NOTE,
    at_tuned_rates,
    loss_bars,
    loss_check,
    validation_rows,
    validation_table,
)
from muonwire.lab.inputs.vision_training import MUONFAST, STEPS, VISION_RATES

# Each with the words that end a sentence about it.
FIXES = {
    "Adam's denominator before": "with Adam’s denominator before the polar factor",
    "Adam's denominator after": "with Adam’s denominator after the polar factor",
    "matrices under 128 left alone": "with matrices under 128 left alone",
    "original magnitude kept": "with the update’s magnitude kept",
    "all three": "with all three fixes",
}


def measure(setting: Setting) -> Iterator[Row]:
    """Validation loss of MuonFast with the rate outside, and with each fix, at their tuned rates."""
    outcomes = at_tuned_rates(setting, "vit", (MUONFAST, *FIXES))
    yield from validation_rows(outcomes, column="fix")
    for name in FIXES:
        yield {"fix": name, "gain": outcomes[MUONFAST][1].loss - outcomes[name][1].loss}


def _lowers(fix: str, where: str) -> Check:
    return loss_check(
        setting=f"with {fix}" if fix == "all three" else f"with the fix “{fix}”",
        column="gain",
        select={"fix": fix},
        at_least=0.0,
        reading=Reading(holds="the loss falls", fails="the loss rises", by="by {size} nats", where=where),
    )


CLAIM = Claim(
    id="vit.6",
    note=NOTE,
    says="to work on a ViT, MuonFast needs Adam’s denominator, or to leave matrices under 128 alone, or to keep "
    "the magnitude of the update",
    question="How much does each fix, and all together, lower the validation loss below that of MuonFast with the "
    "rate outside, each at its own tuned rate?",
    expected="Not by much, or not at all: what fails is the rate inside the polar factor. Leaving all matrices under 128 alone "
    "makes the whole of this ViT momentum SGD.",
    measure=measure,
    inputs=(VISION_RATES,),
    repeats=3,
    checks=tuple(_lowers(fix, where) for fix, where in FIXES.items()),
    meaning={
        "confirmed": "Apply these fixes to Muon on small transformers.",
        "refuted": "With the rate outside, Muon on a small ViT needs none of these fixes; each makes it worse.",
        "depends": "With the rate outside none of these fixes is needed to train; take those that help by the table.",
    },
    tables=(
        validation_table(
            f"Validation after {STEPS} steps at tuned rates",
            rows={"fix": "Fix"},
            gain="Gain over MuonFast",
            lr="Rate",
        ),
    ),
    plots=(loss_bars("fixes", title="Validation loss with each fix", by=("fix", "Fix")),),
)
