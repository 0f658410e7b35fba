"""topdown.1: Muon replaces the weights by their nearest orthogonal matrix."""

import statistics
from collections.abc import Iterator

from muonwire.lab import Check, Claim, Pivot, Reading, Row, Setting
from muonwire.lab.claims.top_down import NOTE
from muonwire.lab.inputs.optimizers import ADAM, MUON, OPTIMIZERS, SGD, TRAINERS, WEIGHTS, final_loss, trained
from muonwire.lab.measures.hidden_spectra import hidden_spectra

COMPARED = (MUON, WEIGHTS, SGD, ADAM)


def measure(setting: Setting) -> Iterator[Row]:
    """Final loss of each, and how far from orthogonal its hidden weights are at the end."""
    folder = setting.input(OPTIMIZERS)
    losses = {name: final_loss(folder, name, seed=setting.seed) for name in COMPARED}
    for name in COMPARED:
        *_, (_, model) = trained(folder, name, seed=setting.seed, quick=setting.quick)
        hidden = hidden_spectra(model, label=name)
        yield {
            "optimizer": name,
            "recipe": TRAINERS[name].recipe,
            "loss": losses[name],
            "over_muon": 100 * (losses[name] / losses[MUON] - 1),
            "condition": statistics.median(s["condition"] for s in hidden),
            "effective_rank": 100 * statistics.fmean(s["effective_rank"] for s in hidden),
        }


CLAIM = Claim(
    id="topdown.1",
    note=NOTE,
    says="Muon is SGD with momentum that replaces the weight matrix with the nearest orthogonal matrix at every step",
    question="What does training come to when the weights are orthogonalized, as the note words it, and when the update "
    "is, as Muon does; and are the weights that Muon trains orthogonal?",
    expected="Muon orthogonalizes the update. Its weights start Gaussian, with a condition number in the hundreds, and "
    "stay far from orthogonal, as sums of orthogonal matrices are not orthogonal. Orthogonalizing the weights keeps "
    "every singular value equal, so that a layer can turn but not choose; it trains worse than Muon.",
    measure=measure,
    inputs=(OPTIMIZERS,),
    checks=(
        Check(
            setting="in training",
            column="over_muon",
            select={"optimizer": WEIGHTS},
            at_most=1.0,
            unit="%",
            reading=Reading(
                holds="orthogonalizing the weights after every step ends within 1 % of Muon’s loss",
                fails="orthogonalizing the weights after every step ends more than 1 % above Muon’s loss",
            ),
        ),
        Check(
            setting="in training",
            column="condition",
            select={"optimizer": MUON},
            at_most=1.5,
            possible=(1.0, 1e12),
            reading=Reading(
                holds="the weights that Muon trains are orthogonal",
                fails="the weights that Muon trains are not orthogonal",
                by="median condition number {mean}",
            ),
        ),
    ),
    meaning={
        "confirmed": "Either reading of Muon trains as well.",
        "refuted": "Orthogonalize the update, not the weight: do not constrain the weights to get Muon’s benefit.",
        "depends": "One of the two holds; the table shows which.",
    },
    tables=(
        Pivot(
            caption="Each at the best of four rates. Condition number and effective rank of the hidden weights at the end",
            rows={"optimizer": "Optimizer", "recipe": "Recipe"},
            values={
                "loss": "Final loss, nats a byte",
                "over_muon": "Above Muon, %",
                "condition": "Condition number, median",
                "effective_rank": "Effective rank, % of r",
            },
        ),
    ),
)
