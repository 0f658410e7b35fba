"""Claims of the note “Why MuonFast fails on vision transformers”, and what those share that end with a validation."""

from collections.abc import Mapping, Sequence

from muonwire.lab import Check, Note, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.inputs.vision_training import STEPS, VISION_RATES, WORST_LOSS, Outcome, compare

NOTE = Note(
    title="Why MuonFast fails on vision transformers",
    about="Why a small vision transformer does not train with a Muon whose learning rate is inside the polar factor, "
    "and how to mend it.",
)
CHANCE = 0.1
# Twice chance: a model that knows more than nothing passes it within a few steps.
NEAR_CHANCE = 2 * CHANCE


def at_tuned_rates(setting: Setting, model: str, methods: Sequence[str]) -> dict[str, tuple[float, Outcome]]:
    """The rate and the outcome of each method on a model, "vit" or "resnet"; the claim's inputs hold ``VISION_RATES``."""
    folder, steps = setting.input(VISION_RATES), setting.pick(STEPS, 2)
    return compare(model, methods, folder, seed=setting.seed, steps=steps, quick=setting.quick)


def validation_rows(outcomes: Mapping[str, tuple[float, Outcome]], *, column: str) -> list[Row]:
    """Rate, loss and accuracy of each, named in ``column``."""
    return [
        {column: name, "lr": lr, "loss": o.loss, "accuracy": o.accuracy} for name, (lr, o) in outcomes.items()
    ]


def loss_check(
    *,
    setting: str,
    column: str,
    reading: Reading,
    select: Mapping[str, Value] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Check:
    """A check of a difference of losses."""
    return Check(
        setting=setting,
        column=column,
        select=select or {},
        at_least=at_least,
        at_most=at_most,
        possible=(-WORST_LOSS, WORST_LOSS),
        unit="nats",
        reading=reading,
    )


def chance_check(setting: str, *, select: Mapping[str, Value], stays: str, trains: str) -> Check:
    """A check that a model does not learn, with how it reads where it does not and where it does."""
    return Check(
        name="accuracy stays below twice chance",
        setting=setting,
        column="accuracy",
        select=select,
        at_most=NEAR_CHANCE,
        possible=(0.0, 1.0),
        reading=Reading(holds=stays, fails=trains, by="accuracy {mean}"),
    )


def validation_table(
    caption: str, *, rows: Mapping[str, str], select: Mapping[str, Value] | None = None, **more: str
) -> Pivot:
    """Loss and accuracy, and more measured columns with their headings."""
    return Pivot(
        caption=caption,
        rows=rows,
        values={"loss": "Loss", "accuracy": "Accuracy", **more},
        select=select or {},
    )


def loss_bars(name: str, *, title: str, by: tuple[str, str]) -> Plot:
    """Validation losses side by side."""
    return Plot(
        name=name,
        title=title,
        how_to_read="Lower is better; chance is 2.3. Thin lines are 95 % intervals over the seeds.",
        x=by,
        y=("loss", "validation loss"),
        mark="bar",
    )
