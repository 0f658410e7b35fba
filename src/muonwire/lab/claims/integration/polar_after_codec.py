"""integration.5: orthogonalizing after decompression cannot help."""

from collections.abc import Iterator

from muonwire.lab import Claim, Pivot, Row, Setting
from muonwire.lab.claims.integration import NOTE
from muonwire.lab.inputs import training

# What is decoded: the recipe that takes its sign, and the one that takes its polar factor.
SIGNALS = {
    "one step’s gradient": ("distro(decay=0.0)", "approach_b(residual_decay=0.0)"),
    "residual momentum": ("distro(scale='chunk', subtract='decoded')", "approach_b"),
    "momentum after the exchange": ("distro", "ef14_muon"),
}
RECIPES = {
    "one step, sign": "distro(decay=0.0)",
    "one step, polar": "approach_b(residual_decay=0.0)",
    "residual, sign": "distro(scale='chunk', subtract='decoded')",
    "residual, polar": "approach_b",
    "momentum after, polar": "ef14_muon",
    "polar before": "pre_polar",
    **training.REFERENCES,
}


def measure(setting: Setting) -> Iterator[Row]:
    """What a polar factor instead of the sign gains, by what was decoded."""
    runs = training.Results.of(setting)
    yield from runs.rows(RECIPES)
    for signal, (sign, polar) in SIGNALS.items():
        yield training.gain(signal, of=runs[polar], over=runs[sign])
        yield {
            "signal": signal,
            "sign_loss": runs[sign].loss,
            "polar_loss": runs[polar].loss,
            "rank": runs[polar].effective_rank,
            "cosine": runs[polar].alignment,
        }


CLAIM = Claim(
    id="integration.5",
    note=NOTE,
    says="orthogonalizing after decompression cannot help: compression leaves most directions dead, and making all "
    "singular values one amplifies only noise",
    question="With DisTrO’s codec in training, does a polar factor of the decoded signal end below its sign: where the signal is "
    "one step’s gradient, where it is a residual momentum, and where momentum gathers decoded signals over many steps?",
    expected="One step’s gradient: no help, as the note says. Residual momentum: a little, since entries that were not sent come "
    "in later steps. Momentum after the exchange: most, for its rank grows with every step. Codec and bits are the same in each "
    "pair.",
    measure=measure,
    inputs=(training.TRAINING,),
    checks=tuple(
        training.gain_check(
            setting=f"of {signal}",
            change=signal,
            below="behind DisTrO’s codec a polar factor ends below the sign",
            above="behind DisTrO’s codec a polar factor ends above the sign",
            where=f"for {signal}",
            helps=False,
        )
        for signal in SIGNALS
    ),
    meaning={
        "confirmed": "Do not orthogonalize what was decoded; the sign is as good.",
        "refuted": "Orthogonalize what was decoded: even of one step’s gradient the polar factor trains better than its sign.",
        "depends": "Orthogonalize the decoded signals for which it lowers the loss, and no others.",
    },
    tables=(
        Pivot(
            caption="Final loss by what was decoded, nats a token; of the polar recipes also the effective rank of "
            "the weights’ change and its cosine with dense Muon’s update",
            rows={"signal": "Decoded signal"},
            values={
                "sign_loss": "Its sign",
                "polar_loss": "Its polar factor",
                "rank": "Effective rank",
                "cosine": "Cosine",
            },
        ),
        training.OUTCOMES,
    ),
    plots=(training.CURVES,),
)
