"""conflict.3: the mean of several replicas' polar factors is not orthogonal."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting, Value
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.samples import MATRICES, REAL, dealt, gaussian
from muonwire.lab.measures.matrices import cosine, departure
from muonwire.polar import polar
from muonwire.polar.quality import exact_factor, orthogonality_error

SIZE = 64
NOISES = (0.1, 0.5, 1.0, 2.0, 4.0)
NUM_REPLICAS = (1, 2, 4, 8)


def _rows(replicas: Sequence[Tensor], truths: Mapping[int, Tensor], where: Row) -> Iterator[Row]:
    """``truths``: by number of replicas, the gradient that their mean estimates; none where none is independent of them."""
    factors = [exact_factor(x).float() for x in replicas]
    for number in NUM_REPLICAS:
        mean, gradient = (torch.stack(list(xs[:number])).mean(0) for xs in (factors, replicas))
        # What a Muon step is content with: five iterations of Jordan's triple.
        accepted = departure(polar(gradient, method="newton_schulz", schedule="jordan", dtype=torch.float32))
        row: dict[str, Value] = {
            **where,
            "replicas": number,
            "error": orthogonality_error(mean),
            "departure": departure(mean),
            "against Muon": departure(mean) / accepted,
            "length": float(mean.norm() / factors[0].norm()),
        }
        if number in truths:
            aim = exact_factor(truths[number]).float()
            row["mean of polars"] = cosine(mean, aim)
            row["polar of mean of polars"] = cosine(exact_factor(mean).float(), aim)
            row["polar of mean"] = cosine(exact_factor(gradient).float(), aim)
        yield row


def _real(setting: Setting) -> Iterator[tuple[str, list[Tensor]]]:
    for name, label in REAL.items():
        apart: dict[tuple[str, str], list[Tensor]] = {}
        for one in captured(setting.input(name), kind="gradient", replicas=True):
            apart.setdefault((one.point, one.layer), []).append(one.matrix)
        for members in dealt(setting, list(apart.values())):
            if all(x.any() for x in members):
                yield f"{label} gradient", members


def measure(setting: Setting) -> Iterator[Row]:
    """The mean of the polar factors of 1, 2, 4 and 8 replicas beside the polar factor of the mean.

    Made replicas are a common Gaussian matrix, the truth, plus noise of their own. On real gradients the truth for the first one to
    four batches is the mean of the other four.
    """
    signal = gaussian(setting, SIZE, SIZE)
    for noise in NOISES:
        replicas = [
            signal + noise * gaussian(setting, SIZE, SIZE, stream=1 + r) for r in range(max(NUM_REPLICAS))
        ]
        yield from _rows(
            replicas, dict.fromkeys(NUM_REPLICAS, signal), {"data": f"Gaussian, noise {noise:g}"}
        )
    for data, replicas in _real(setting):
        half = len(replicas) // 2
        others = torch.stack(replicas[half:]).mean(0)
        yield from _rows(replicas, {n: others for n in NUM_REPLICAS if n <= half}, {"data": data})


def _not_orthogonal(data: str, setting: str) -> Check:
    return Check(
        name="the mean of eight replicas' polar factors is farther from orthogonal than Muon's own five iterations leave a step",
        setting=setting,
        column="against Muon",
        select={"data": data, "replicas": 8},
        at_least=1.0,
        possible=(0.0, 1e6),
        unit="× Muon's departure",
        reading=Reading(
            holds="the mean of eight polar factors is less orthogonal than Muon’s own step",
            fails="the mean of eight polar factors is as orthogonal as Muon’s own step",
            by="{mean} times its departure",
            where=setting,
        )
        if data != "Gaussian, noise 1"
        else None,
    )


CLAIM = Claim(
    id="conflict.3",
    note=NOTE,
    says="if every replica's update is orthogonal, their sum is still not",
    quoted={"what it states": "(U1 + U2) @ (U1 + U2).T ≠ I"},
    question="How far from orthogonal, at its best scale, is the mean of 1 to 8 replicas' polar factors, as noise between "
    "replicas grows? How much shorter is the step? And is the polar factor of the mean nearer to that of the true gradient?",
    expected="Not orthogonal as soon as replicas differ by more than a fraction of the gradient, and shorter by up "
    "to the square root of the number of replicas. As a direction it may be as good as the polar factor of the "
    "mean, or better: it is a mean of more than the polar factor keeps.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _not_orthogonal("Gaussian, noise 0.1", "where replicas differ by a tenth of the gradient"),
        _not_orthogonal("Gaussian, noise 1", "where replicas differ by as much as the gradient"),
        _not_orthogonal("training gradient", "on gradients of a training run"),
        _not_orthogonal("language-model gradient", "on gradients of a language model"),
    ),
    meaning={
        "confirmed": "Exchange before orthogonalizing, or orthogonalize the mean once more.",
        "refuted": "Replicas may orthogonalize before they exchange: the mean is as orthogonal as Muon's own step.",
        "depends": "Where replicas differ as they do in training, orthogonalize the mean once more, or choose the rate for the "
        "shorter step.",
    },
    tables=(
        Pivot(
            caption="The mean M of the polar factors: ‖MMᵀ − I‖_F/√m, at the best scale, over the same of five "
            "Newton-Schulz iterations, its length over a polar factor's; and cosines to the polar factor of the "
            "true gradient, on real ones of that of four other batches",
            rows={"data": "Data", "replicas": "Replicas"},
            values={
                "error": "Error",
                "departure": "At best scale",
                "against Muon": "× Muon's",
                "length": "Length",
                "mean of polars": "Mean of polars",
                "polar of mean of polars": "Polar of that",
                "polar of mean": "Polar of mean",
            },
        ),
    ),
    plots=(
        Plot(
            name="replicas",
            title="Departure of the mean of polar factors from orthogonality",
            how_to_read="0 is a multiple of an orthogonal matrix. The polar factor of the mean has 0 for any "
            "number of replicas.",
            x=("replicas", "replicas"),
            y=("departure", "departure at the best scale"),
            series=("data", "Data"),
        ),
        Plot(
            name="length",
            title="Length of the mean of polar factors",
            how_to_read="1 is the length of each replica's polar factor; a shorter mean is a smaller step.",
            x=("replicas", "replicas"),
            y=("length", "length over a polar factor's"),
            series=("data", "Data"),
        ),
    ),
)
