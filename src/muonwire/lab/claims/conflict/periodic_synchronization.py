"""approach.F: DisTrO, and every P steps everything in full, orthogonalized."""

from collections.abc import Iterator

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training

PERIODS = {3: "approach_f(period=3)", 10: "approach_f", 50: "approach_f(period=50)"}
RECIPES = {
    **{f"every {period} steps": recipe for period, recipe in PERIODS.items()},
    "approach B": "approach_b",
    **training.REFERENCES,
}


def _gains(period: int, setting: str) -> Check:
    return training.gain_check(
        setting=setting,
        change=f"every {period} steps",
        below="full steps lower DisTrO’s loss",
        above="full steps raise DisTrO’s loss",
        where=f"with one in {period}",
    )


def measure(setting: Setting) -> Iterator[Row]:
    """Approach F at three periods, between DisTrO alone and dense Muon."""
    runs = training.Results.of(setting)
    distro, muon, every_step = runs["distro"], runs["muon"], runs["approach_b"]
    yield from runs.rows(RECIPES)
    for period, recipe in PERIODS.items():
        f = runs[recipe]
        yield training.gain(f"every {period} steps", of=f, over=distro)
        yield {
            "period": period,
            "loss_share": training.share_of_gain(f, start=distro, end=muon),
            "bits_share": 100 * f.bits / muon.bits,
            "time": f.optimizer_ms / every_step.optimizer_ms,
        }


CLAIM = Claim(
    id="approach.F",
    note=NOTE,
    says="DisTrO for nine steps, and at the tenth a full synchronization, orthogonalized, spreads the cost of "
    "orthogonalization over the steps; how often is enough is open",
    quoted={"period": "10"},
    question="With periods of 3, 10 and 50 steps: does it end below DisTrO alone, how far does it go towards dense "
    "Muon, and is its optimizer faster than one that orthogonalizes every step?",
    expected="No period helps much: one orthogonal step in ten moves the weights no farther than the nine others "
    "do, and the bits of a full step every ten are forty times DisTrO’s. The residual momentum is sent in full, "
    "not the weights, which DisTrO keeps equal on all replicas anyway.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        _gains(10, "every 10 steps, as in the note"),
        _gains(50, "every 50 steps"),
        training.half_way_check(
            "with one in 10 it", setting="every 10 steps, in loss", select={"period": 10}
        ),
        Check(
            setting="by time",
            column="time",
            select={"period": 10},
            at_most=1.0,
            possible=(0.0, float("inf")),
            unit="of approach B’s",
            reading=Reading(
                holds="it takes less time than orthogonalizing every step",
                fails="it takes no less time than orthogonalizing every step",
                by="{mean} times",
            ),
        ),
    ),
    meaning={
        "confirmed": "Send a full orthogonalized step every ten; that is often enough.",
        "refuted": "Full steps among compressed ones buy nothing; leave them out.",
        "depends": "The table says what each period buys and what it sends: a full step every ten costs a tenth of dense Muon’s "
        "bits on the hidden matrices, so compare it with recipes that orthogonalize every step at DisTrO’s bits.",
    },
    tables=(
        training.OUTCOMES,
        Pivot(
            caption="By period: part of the way from DisTrO alone to dense Muon in loss, %; bits in % of dense "
            "Muon’s; optimizer time over approach B’s",
            rows={"period": "Period"},
            values={"loss_share": "Part of the way", "bits_share": "Bits", "time": "Time"},
        ),
        training.GAINS,
    ),
    plots=(
        training.CURVES,
        Plot(
            name="period",
            title="How often is enough?",
            how_to_read="0 is DisTrO alone, 100 is dense Muon. The band is a 95 % interval over the seeds.",
            x=("period", "Steps from one full synchronization to the next"),
            y=("loss_share", "% of the way to dense Muon"),
            log_x=True,
        ),
    ),
)
