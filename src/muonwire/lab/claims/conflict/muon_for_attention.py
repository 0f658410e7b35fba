"""approach.D: dense Muon for attention, DisTrO for the rest."""

from muonwire.lab import Claim, Pivot, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training

RECIPES = {"approach D": "approach_d", **training.REFERENCES}
WAY = {"way": "from DisTrO alone to dense Muon"}


def measure(setting: Setting) -> list[Row]:
    """Approach D between DisTrO alone and dense Muon."""
    runs = training.Results.of(setting)
    d, distro, muon = runs["approach_d"], runs["distro"], runs["muon"]
    return [
        *runs.rows(RECIPES),
        training.instead_of_distro("D", runs, "approach_d"),
        {
            **WAY,
            "loss_share": training.share_of_gain(d, start=distro, end=muon),
            "bits_share": 100 * (d.bits - distro.bits) / (muon.bits - distro.bits),
        },
    ]


CLAIM = Claim(
    id="approach.D",
    note=NOTE,
    says="Muon without compression for attention weights and DisTrO for the others is a practical middle ground "
    "that trades bandwidth for convergence, since attention is where orthogonality matters most",
    question="Does it end below DisTrO alone, and which part of the way to dense Muon does it go, in loss and in bits?",
    expected="Below DisTrO alone, but less than half of the way to dense Muon, for a quarter of its bits: the MLP holds most of "
    "the parameters. “Local Muon” is read as dense Muon: attention weights that nobody exchanges would drift apart.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        training.below_distro_check("D", setting="against DisTrO alone"),
        training.half_way_check("it", setting="in loss", select=WAY),
    ),
    meaning={
        "confirmed": "Where the link has room for a quarter of dense traffic, spend it on attention.",
        "refuted": "Dense attention beside a compressed MLP buys nothing; spend the bytes elsewhere.",
        "depends": "Prefer recipes that orthogonalize every matrix and compress afterwards or seldom: they come further with "
        "fewer bits.",
    },
    tables=(
        training.OUTCOMES,
        Pivot(
            caption="Part of the way from DisTrO alone to dense Muon, %",
            rows={"way": "Way"},
            values={"loss_share": "In loss", "bits_share": "In bits"},
        ),
    ),
    plots=(training.CURVES,),
)
