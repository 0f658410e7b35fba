"""hypothesis.1: the hybrid by layer, approach D, is the most promising."""

import math
from collections.abc import Iterator, Mapping

from muonwire.lab import Check, Claim, Pivot, Plot, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training

GROUPS: Mapping[str, Mapping[str, str]] = {
    "as described": {
        "A": "approach_a",
        "B": "approach_b",
        "C": "approach_c",
        "D": "approach_d",
        "E": "approach_e",
        "F": "approach_f",
    },
    "at D’s bytes": {
        "A": f"approach_a(codec='{training.WIDE}')",
        "B": f"approach_b(codec='{training.WIDE}')",
        "C": f"approach_c(codec='{training.WIDE}')",
        "D": "approach_d",
        "E": "approach_e(rank=13)",
        "F": "approach_f(period=3)",
    },
}
BESIDE = {"DisTrO alone": "distro", "one_bit_muon": "one_bit_muon", "dense Muon": "muon"}


def measure(setting: Setting) -> Iterator[Row]:
    """The six approaches ranked by final loss, as described and with options that make them send as D does."""
    runs = training.Results.of(setting)
    for group, recipes in GROUPS.items():
        losses = {name: math.inf if math.isnan(runs[r].loss) else runs[r].loss for name, r in recipes.items()}
        best_other = min(loss for name, loss in losses.items() if name != "D")
        for name, recipe in recipes.items():
            yield {
                "group": group,
                "approach": name,
                "loss": runs[recipe].loss,
                "bits": runs[recipe].bits,
                "rank": 1 + sum(loss < losses[name] for loss in losses.values()),
            }
        yield {"group": group, "lead": best_other - losses["D"]}
    for name, recipe in BESIDE.items():
        yield {"group": "beside them", "approach": name, "loss": runs[recipe].loss, "bits": runs[recipe].bits}


def _leads(group: str, setting: str) -> Check:
    return training.lead_check(
        setting=setting,
        column="lead",
        select={"group": group},
        ahead="approach D ends below the best other approach",
        behind="approach D ends above the best other approach",
        where=setting,
    )


CLAIM = Claim(
    id="hypothesis.1",
    note=NOTE,
    says="of the six approaches D, Muon for attention and DisTrO for the rest, is the most promising",
    question="Which of the approaches ends lowest, each as described and its own bytes, and each with options that "
    "make it send as much as D does?",
    expected="D is not first: as described E sends fewer bits and orthogonalizes every matrix; at D’s bytes A, B and C with a "
    "quarter of all coefficients in full precision are nearly dense, and B and C orthogonalize every matrix too.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        _leads("as described", "with each approach as described"),
        _leads("at D’s bytes", "with all at D’s bytes"),
    ),
    meaning={
        "confirmed": "Spend your bytes on attention: no other of the six uses them better.",
        "refuted": "Do not split by layer: another of the six approaches ends lower; the table ranks them.",
        "depends": "Whether splitting by layer is best hangs on the bytes you compare at: look up your own in the table.",
    },
    tables=(
        Pivot(
            caption="Final loss, nats a token, and rank among the six; bits a parameter and step",
            rows={"group": "Compared", "approach": "Approach"},
            values={"loss": "Loss", "rank": "Rank", "bits": "Bits"},
        ),
    ),
    plots=(
        Plot(
            name="rank",
            title="The six approaches, as described and at D’s bytes",
            how_to_read="Lower is better. Thin lines are 95 % intervals over the seeds.",
            x=("approach", "Approach"),
            y=("loss", "Final loss, nats a token"),
            series=("group", "Compared"),
            mark="bar",
        ),
    ),
)
