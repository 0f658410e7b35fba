"""vit.5: dimension-aware scaling does not help, because the direction is wrong."""

from collections.abc import Iterator

from muonwire.lab import Claim, Plot, Reading, Row, Setting
from muonwire.lab.claims.vision import NOTE, chance_check, loss_check, validation_table
from muonwire.lab.inputs.vision_training import (
    METHODS,
    STEPS,
    VISION_RATES,
    train,
    tuned_factors,
    tuned_rate,
    vision_task,
)

SCALED = "dimension-aware scale"
NOTES_RATE = 3e-4
AT_NOTES, AT_TUNED = "the note's rate", "tuned rate"


def measure(setting: Setting) -> Iterator[Row]:
    """Losses over a sweep of rates with the scale fixed, and Adam's at its tuned rate."""
    task, steps = vision_task("vit", quick=setting.quick), setting.pick(STEPS, 2)
    folder = setting.input(VISION_RATES)
    method = METHODS[SCALED]
    tuned = tuned_rate(folder, "vit", SCALED)
    rates = [method.centre * factor for factor in tuned_factors(setting.quick)]
    losses: dict[float, float] = {}
    for lr in (NOTES_RATE, *rates):
        outcome = train(task, method.recipe, lr=lr, seed=setting.seed, steps=steps)
        losses[lr] = outcome.loss
        yield {"method": SCALED, "lr": lr, "loss": outcome.loss, "accuracy": outcome.accuracy}
        for at, chosen in ((AT_NOTES, NOTES_RATE), (AT_TUNED, tuned)):
            if lr == chosen:
                yield {"at": at, "loss": outcome.loss, "accuracy": outcome.accuracy}
    lr = tuned_rate(folder, "vit", "Adam")
    adam = train(task, METHODS["Adam"].recipe, lr=lr, seed=setting.seed, steps=steps)
    yield {"at": "Adam at its tuned rate", "loss": adam.loss, "accuracy": adam.accuracy}
    yield {"scaled - adam": losses[tuned] - adam.loss}


CLAIM = Claim(
    id="vit.5",
    note=NOTE,
    says="multiplying the orthogonalized update by (min(m, n)/256)², 0.0625 for this ViT, does not help, because "
    "the direction is wrong",
    quoted={"factor": "0.0625", "relative update": "0.00115 %"},
    question="With this scale, is there a learning rate at which the ViT trains, and how well?",
    expected="With matrices of one smaller side the scale is a constant, so it only divides the rate by 16. At "
    "0.0003 nothing moves; at a rate 16 times that of the plain polar factor it trains just as well.",
    measure=measure,
    inputs=(VISION_RATES,),
    repeats=3,
    checks=(
        chance_check(
            "as in the note, at a rate of 0.0003",
            select={"at": AT_NOTES},
            stays="at the note’s rate of 0.0003 the scaled update does not train the ViT",
            trains="at the note’s rate of 0.0003 the scaled update trains the ViT",
        ),
        chance_check(
            "in training at its best rate",
            select={"at": AT_TUNED},
            stays="at the best of five rates it does not train it",
            trains="at the best of five rates it trains it",
        ),
        loss_check(
            setting="in training, both at their best rates",
            column="scaled - adam",
            at_least=0.0,
            reading=Reading(
                holds="its loss is then above that of tuned Adam",
                fails="its loss is then below that of tuned Adam",
                by="by {size} nats",
            ),
        ),
    ),
    meaning={
        "confirmed": "No rate makes this scale work on a small ViT; use another optimizer.",
        "refuted": "The scale does no harm; it only asks for a larger learning rate.",
        "depends": "The scale divides the rate by a constant and changes nothing else: whether it works is a "
        "question of the rate. A rate tried once says nothing about a direction; sweep it.",
    },
    tables=(
        validation_table(
            f"Validation after {STEPS} steps, by learning rate, with the scale fixed",
            rows={"lr": "Rate"},
            select={"method": SCALED},
        ),
        validation_table(
            "At the note’s rate, at the best of five by another seed, and Adam", rows={"at": "Rate"}
        ),
    ),
    plots=(
        Plot(
            name="sweep",
            title="Validation loss by learning rate, dimension-aware scale",
            how_to_read="Chance is 2.3. Lower is better.",
            x=("lr", "learning rate"),
            y=("loss", "validation loss"),
            log_x=True,
            select={"method": SCALED},
        ),
    ),
)
