"""approach.C: orthogonalize, and compress the residual."""

from collections.abc import Iterator

from muonwire.lab import Check, Claim, Pivot, Reading, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs import training
from muonwire.lab.inputs.samples import samples_of
from muonwire.lab.inputs.text_training import TEXT_TRAINING
from muonwire.lab.measures.matrices import cosine, polar_factor, relative_error, through
from muonwire.recipes.compressed import CODEC

RECIPES = {
    "approach C": "approach_c",
    "approach B": "approach_b",
    **training.REFERENCES,
}


def _residuals(setting: Setting) -> Iterator[Row]:
    for m in samples_of(setting, TEXT_TRAINING, kind="momentum", num_parts=len(training.SEEDS)):
        u = polar_factor(m)
        scaled = m - cosine(m, u) * m.norm() / u.norm() * u
        plain = relative_error(through(CODEC, m), m)
        for name, r in (("momentum − polar factor", m - u), ("momentum − s · polar factor", scaled)):
            yield {
                "residual": name,
                "size": float(r.norm() / m.norm()),
                "error": relative_error(through(CODEC, r), r),
                "saved": 100 * (plain - relative_error(through(CODEC, r), r)) / plain,
            }
        yield {"residual": "momentum itself", "size": 1.0, "error": plain}


def measure(setting: Setting) -> list[Row]:
    """The residual's size and compressibility on real momentum, and approach C beside DisTrO alone."""
    runs = training.Results.of(setting)
    return [
        *_residuals(setting),
        *runs.rows(RECIPES),
        training.instead_of_distro("C", runs, "approach_c"),
        training.gain("C instead of B", of=runs["approach_c"], over=runs["approach_b"]),
    ]


CLAIM = Claim(
    id="approach.C",
    note=NOTE,
    says="what orthogonalization removes from the momentum, momentum − polar factor, might be small and "
    "compressible; how to aggregate the polar factors is open",
    question="How large is the residual beside the momentum, as written and with the polar factor at its best scale; does the "
    "codec lose less of it; and how does it train, with the polar factor of the last shared estimate as what need not be sent?",
    expected="Not small: a polar factor’s norm is √min(m, n) whatever the momentum’s is, so that the residual as "
    "written is minus the polar factor; at the best scale it is √(1 − cos²), most of the momentum for peaked "
    "spectra. No more compressible. In training no gain.",
    measure=measure,
    inputs=(TEXT_TRAINING, training.TRAINING),
    checks=(
        Check(
            setting="on real momentum, as written",
            column="size",
            select={"residual": "momentum − polar factor"},
            at_most=1.0,
            possible=(0.0, float("inf")),
            unit="of its norm",
            reading=Reading(
                holds="as written the residual is smaller than the momentum",
                fails="as written the residual is larger than the momentum",
                by="{mean} times",
            ),
        ),
        Check(
            name="it is at most half of the momentum",
            setting="on real momentum, at the best scale",
            column="size",
            select={"residual": "momentum − s · polar factor"},
            at_most=0.5,
            possible=(0.0, 1.0),
            unit="of its norm",
            reading=Reading(
                holds="at the best scale it is at most half of it",
                fails="at the best scale it is more than half of it",
                by="{mean} of its norm",
            ),
        ),
        Check(
            setting="on real momentum, through DisTrO’s codec",
            column="saved",
            select={"residual": "momentum − s · polar factor"},
            at_least=0.0,
            possible=(float("-inf"), 100.0),
            unit="%",
            reading=Reading(
                holds="the codec loses a smaller share of the residual",
                fails="the codec loses no smaller share of the residual",
                by="{mean} % less",
            ),
        ),
        training.below_distro_check("C"),
    ),
    meaning={
        "confirmed": "Send what a shared polar prediction leaves over: it is smaller and easier to compress.",
        "refuted": "Do not subtract a polar factor before the codec: what is left is as large and no easier to compress.",
        "depends": "Compare it with approach B, which leaves the prediction out, before you spend anything on it.",
    },
    tables=(
        Pivot(
            caption="What is left of real momentum, ‖residual‖/‖momentum‖, and the relative error of DisTrO’s codec on it",
            rows={"residual": "Matrix"},
            values={"size": "Norm", "error": "Error of the codec"},
        ),
        training.OUTCOMES,
        training.GAINS,
    ),
    plots=(training.CURVES,),
)
