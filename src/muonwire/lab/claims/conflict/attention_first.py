"""hypothesis.3: attention weights need orthogonalization most."""

from collections.abc import Iterator

from muonwire.lab import Claim, Pivot, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training
from muonwire.lab.inputs.captured import hidden_matrices
from muonwire.tasks.models import build_llama

RECIPES = {
    "none (AdamW)": "adamw",
    "attention": "muon(adam=['mlp'])",
    "MLP": "muon(adam=['self_attn'])",
    "all": "muon",
}
BESIDE = {"attention beside MLP": "difference"}
ROLES = {"attention": "self_attn", "MLP": "mlp"}


def measure(setting: Setting) -> Iterator[Row]:
    """Dense Muon on attention, on the MLP, on both and on neither; AdamW for what is left."""
    runs = training.Results.of(setting)
    matrices = hidden_matrices(build_llama("pico", vocabulary=256, sequence=64, seed=0))
    none = runs["adamw"]
    yield from runs.rows(RECIPES)
    gains, dense = {}, {}
    for name, role in ROLES.items():
        run = runs[RECIPES[name]]
        weights = sum(p.numel() for layer, p in matrices.items() if role in layer)
        gains[name], dense[name] = run.below(none), run.below(none) / weights * 1e6
        yield {
            "orthogonalized": name,
            "gain": gains[name],
            "share": training.share_of_gain(run, start=none, end=runs["muon"]),
            "weights": weights,
            "per_million": dense[name],
        }
    yield {"orthogonalized": "both", "gain": runs["muon"].below(none), "share": 100.0}
    yield {
        **BESIDE,
        "lead": gains["attention"] - gains["MLP"],
        "lead_per_million": dense["attention"] - dense["MLP"],
    }


CLAIM = Claim(
    id="hypothesis.3",
    note=NOTE,
    says="attention weights are where orthogonality matters most; MLP weights are larger and benefit more from compression",
    question="Does Muon on attention alone gain more over AdamW than Muon on the MLP alone, in all and for each "
    "weight that it orthogonalizes?",
    expected="The MLP gains more in all, having more than twice the weights; for each weight the two are about level.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        training.lead_check(
            setting="in all",
            column="lead",
            select=BESIDE,
            ahead="orthogonalizing attention alone gains more than orthogonalizing the MLP alone",
            behind="orthogonalizing attention alone gains less than orthogonalizing the MLP alone",
        ),
        training.lead_check(
            setting="for each weight",
            column="lead_per_million",
            select=BESIDE,
            ahead="for each weight it gains more",
            behind="for each weight it gains less",
            unit=f"{training.NATS} and million weights",
        ),
    ),
    meaning={
        "confirmed": "If only some matrices can be orthogonalized, or sent densely, take attention.",
        "refuted": "Do not leave the MLP out: orthogonalizing it gains more than attention, in all and for each weight.",
        "depends": "Where the budget is bytes, take the one that gains more for each weight; orthogonalize both where you can.",
    },
    tables=(
        training.OUTCOMES,
        Pivot(
            caption="What Muon on some matrices gains over AdamW on all: final loss, nats a token; share of the gain on all, %",
            rows={"orthogonalized": "Orthogonalized"},
            values={
                "gain": "Gain",
                "share": "Share",
                "weights": "Weights",
                "per_million": "Gain for each million weights",
            },
        ),
    ),
    plots=(training.CURVES,),
)
