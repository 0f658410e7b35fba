"""approach.A: Muon's momentum, compressed, without orthogonalization."""

from muonwire.lab import Claim, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training

RECIPES = {
    "approach A": "approach_a",
    "A without momentum": "approach_a(momentum=0.0)",
    "approach B": "approach_b",
    **training.REFERENCES,
}


def measure(setting: Setting) -> list[Row]:
    """Approach A beside itself without momentum, with a polar factor, and DisTrO alone."""
    runs = training.Results.of(setting)
    a = runs["approach_a"]
    return [
        *runs.rows(RECIPES),
        training.gain("momentum before the codec", of=a, over=runs["approach_a(momentum=0.0)"]),
        training.gain("a polar factor behind the codec", of=runs["approach_b"], over=a),
        training.instead_of_distro("A", runs, "approach_a"),
    ]


CLAIM = Claim(
    id="approach.A",
    note=NOTE,
    says="compressing Muon’s momentum without orthogonalizing it keeps the benefit of its smoothing, loses that of "
    "orthogonalization, and might be good enough",
    question="With DisTrO’s codec and error feedback, does momentum before the codec lower the loss, would a polar "
    "factor behind it lower it further, and does the approach end below DisTrO alone?",
    expected="Momentum hardly helps, since the error feedback and the sign behind it smooth already; a polar "
    "factor lowers the loss; level with DisTrO alone, whose residual momentum is nearly the same thing.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=(
        training.gain_check(
            setting="with momentum against without",
            change="momentum before the codec",
            below="momentum before the codec lowers the loss",
            above="momentum before the codec raises the loss",
        ),
        training.gain_check(
            setting="against approach B",
            change="a polar factor behind the codec",
            below="a polar factor behind the codec lowers it",
            above="a polar factor behind the codec raises it",
        ),
        training.below_distro_check("A", setting="against DisTrO alone"),
    ),
    meaning={
        "confirmed": "Momentum before a compressing exchange pays, and a polar factor behind it pays more.",
        "refuted": "Momentum before a compressing exchange with feedback gains nothing, nor does a polar factor behind it.",
        "depends": "The note’s three expectations of this approach do not hold together: see which of momentum, "
        "the polar factor and the comparison with DisTrO alone carries the gain before you spend a buffer on it.",
    },
    tables=(training.OUTCOMES,),
    plots=(training.CURVES,),
)
