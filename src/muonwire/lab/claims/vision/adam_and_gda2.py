"""vit.7: Adam or GDA2 is better on a vision transformer."""

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
from muonwire.lab.inputs.vision_training import DESCRIBED, MUONFAST, RATE_FACTORS, STEPS, VISION_RATES

METHODS_COMPARED = ("Adam", "SGD", "GDA2", "Muon", MUONFAST, DESCRIBED)
IN_WORDS = {
    DESCRIBED: "MuonFast with its rate inside",
    MUONFAST: "MuonFast with its rate outside",
    "Muon": "Muon",
}


def measure(setting: Setting) -> Iterator[Row]:
    """Validation loss of each method at its tuned rate, and how far each is behind Adam and GDA2."""
    outcomes = at_tuned_rates(setting, "vit", METHODS_COMPARED)
    yield from validation_rows(outcomes, column="method")
    for theirs in ("Adam", "GDA2"):
        for ours in ("Muon", MUONFAST, DESCRIBED):
            gap = outcomes[ours][1].loss - outcomes[theirs][1].loss
            yield {"better": theirs, "worse": ours, "gap": gap}


def _lower(theirs: str, ours: str) -> Check:
    return loss_check(
        setting=f"against {ours}",
        column="gap",
        select={"better": theirs, "worse": ours},
        at_least=0.0,
        reading=Reading(
            holds=f"{theirs} has a lower loss than",
            fails=f"{theirs} has a higher loss than",
            by="by {size} nats",
            where=IN_WORDS[ours],
        ),
    )


CLAIM = Claim(
    id="vit.7",
    note=NOTE,
    says="for a vision transformer use Adam or GDA2, not MuonFast",
    question="Which of Adam, SGD, GDA2, Muon and MuonFast has the lowest validation loss, each at the best of five rates?",
    expected="With the rate inside MuonFast fails. With the rate outside, Muon is at least as good as Adam. GDA2 is near Adam, "
    "since its regularization answers the noise in the differences of small batches’ gradients by mixing little.",
    measure=measure,
    inputs=(VISION_RATES,),
    repeats=3,
    checks=tuple(
        _lower(theirs, ours) for theirs in ("Adam", "GDA2") for ours in (DESCRIBED, MUONFAST, "Muon")
    ),
    meaning={
        "confirmed": "Use Adam or GDA2 for a small ViT.",
        "refuted": "Muon in any of these forms does better than Adam and GDA2 on a small ViT.",
        "depends": "Follow the note’s advice for MuonFast as it is described; for Muon look at the table, with the rate outside.",
    },
    tables=(
        validation_table(
            f"Validation of the ViT after {STEPS} steps of 128 digits, each method at the best of {len(RATE_FACTORS)} rates",
            rows={"method": "Method"},
            lr="Rate",
        ),
    ),
    plots=(loss_bars("methods", title="Validation loss of the ViT by method", by=("method", "Method")),),
)
