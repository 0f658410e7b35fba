"""hypothesis.2: momentum gives most of Muon's benefit, orthogonalization is secondary."""

from collections.abc import Iterator

from muonwire.lab import Check, Claim, Pivot, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training

RECIPES = {
    "SGD": "sgd(momentum=0.0)",
    "SGD, momentum": "sgd",
    "polar, no momentum": "muon(momentum=0.0)",
    "dense Muon": "muon",
    "AdamW": "adamw",
    "A without momentum": "approach_a(momentum=0.0)",
    "approach A": "approach_a",
    "approach B": "approach_b",
}
# Neither, momentum alone, momentum and a polar factor.
STEPS = {
    "dense": ("sgd(momentum=0.0)", "sgd", "muon"),
    "compressed": ("approach_a(momentum=0.0)", "approach_a", "approach_b"),
}


def measure(setting: Setting) -> Iterator[Row]:
    """What momentum gains, and what a polar factor gains on top of it, dense and behind DisTrO's codec."""
    runs = training.Results.of(setting)
    yield from runs.rows(RECIPES)
    for transport, (neither, momentum, both) in STEPS.items():
        first = runs[momentum].below(runs[neither])
        second = runs[both].below(runs[momentum])
        yield {
            "exchange": transport,
            "momentum": first,
            "polar": second,
            "lead": first - second,
            "share": training.share_of_gain(runs[momentum], start=runs[neither], end=runs[both]),
        }
    alone = training.share_of_gain(
        runs["muon(momentum=0.0)"], start=runs["sgd(momentum=0.0)"], end=runs["muon"]
    )
    yield {"alone": "polar factor without momentum, dense", "share": alone}


def _leads(transport: str, setting: str) -> Check:
    return training.lead_check(
        setting=setting,
        column="lead",
        select={"exchange": transport},
        ahead="momentum gains more than orthogonalization on top of it",
        behind="momentum gains less than orthogonalization on top of it",
        where=setting,
    )


CLAIM = Claim(
    id="hypothesis.2",
    note=NOTE,
    says="the smoothing of momentum provides most of Muon’s benefit, and orthogonalization is a smaller, secondary effect",
    question="From SGD to SGD with momentum to Muon: which step lowers the loss more? And from approach A without "
    "momentum to approach A to approach B, behind DisTrO’s codec?",
    expected="Orthogonalization gives nearly all of it: dense, momentum SGD is little better than SGD, and polar factors without "
    "momentum are close to Muon, since batches here are large. Dense Muon’s embeddings and norms have Adam, SGD’s have not, so "
    "its gain is an upper bound. Compressed, feedback and signs smooth already, so that momentum gains little.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        _leads("dense", "in dense training"),
        _leads("compressed", "in compressed training"),
    ),
    meaning={
        "confirmed": "Momentum without a polar factor has most of Muon’s benefit; orthogonalize only where it is cheap.",
        "refuted": "Do not leave out the polar factor to make compression easier: it is the main thing.",
        "depends": "What momentum and the polar factor give differs between dense and compressed exchange; the table has each.",
    },
    tables=(
        Pivot(
            caption="What each step gains in final loss, nats a token, and momentum’s share of both, %",
            rows={"exchange": "Exchange"},
            values={"momentum": "Momentum", "polar": "Polar factor on top", "share": "Momentum’s share"},
        ),
        Pivot(
            caption="Share of the way from SGD to dense Muon, %",
            rows={"alone": "With"},
            values={"share": "Share"},
        ),
        training.OUTCOMES,
    ),
    plots=(training.CURVES,),
)
