"""approach.B: orthogonalization of what the replicas sent, on every replica or on a server."""

from collections.abc import Iterator

from muonwire.lab import Check, Claim, Pivot, Reading, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training

RECIPES = {
    "approach B": "approach_b",
    "B with a server": "approach_b(server=True)",
    "B at 9 bits": "approach_b(codec='dct(chunk=64) | topk(k=1024) | float32')",
    **training.REFERENCES,
}


def measure(setting: Setting) -> Iterator[Row]:
    """Approach B with and without a server beside DisTrO alone and dense Muon."""
    runs = training.Results.of(setting)
    b, served = runs["approach_b"], RECIPES["B with a server"]
    yield from runs.rows(RECIPES)
    for name, recipe in RECIPES.items():
        if recipe in runs:
            yield {
                "update": name,
                "rank": runs[recipe].effective_rank,
                "cosine": runs[recipe].alignment,
                "egress_kb": runs[recipe].egress_bytes / 1000,
            }
    if served in runs:
        yield {"server": "against none", "ratio": runs[served].egress_bytes / b.egress_bytes}
    yield training.instead_of_distro("B", runs, "approach_b")


CLAIM = Claim(
    id="approach.B",
    note=NOTE,
    says="orthogonalizing what all replicas sent preserves orthogonalization in the final update; a server that "
    "does it costs more bandwidth, since it has to send the full update back",
    question="Is the update orthogonal, what does it gain over DisTrO alone, and how much more leaves the link of "
    "the replica that serves?",
    expected="The update’s singular values are not all alike, since top-k leaves many directions near zero at 0.08 bit; the loss "
    "is below DisTrO’s. The server is not needed, and with one, hundreds of times more leaves its link.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        Check(
            setting="by the singular values of the weights’ change",
            column="rank",
            select={"update": "approach B"},
            at_least=0.9,
            possible=(0.0, 1.0),
            reading=Reading(
                holds="the update is nearly orthogonal",
                fails="the update is not orthogonal",
                by="effective rank {mean} of 1",
            ),
        ),
        training.below_distro_check("B", setting="against DisTrO alone"),
        Check(
            setting="with a server against without",
            column="ratio",
            select={"server": "against none"},
            at_least=1.0,
            unit="times",
            reading=Reading(
                holds="more leaves a replica that serves the others",
                fails="no more leaves a replica that serves the others",
                by="{mean} times as much",
            ),
        ),
    ),
    meaning={
        "confirmed": "Orthogonalize what was decoded, on every replica. Only replicas that round differently need a server.",
        "refuted": "Orthogonalizing what was decoded neither makes the update orthogonal nor helps.",
        "depends": "Leave out the server: every replica can decode and orthogonalize by itself. Whether it pays hangs on what "
        "the codec leaves of the small singular values: compare the effective ranks and the losses below.",
    },
    tables=(
        training.OUTCOMES,
        Pivot(
            caption="The change of the weights: effective rank as a share of the smaller dimension, cosine with "
            "dense Muon’s update, and kB a step that leave the first replica’s link",
            rows={"update": "Recipe"},
            values={"rank": "Effective rank", "cosine": "Cosine", "egress_kb": "Leaves the link"},
        ),
    ),
    plots=(training.CURVES,),
)
