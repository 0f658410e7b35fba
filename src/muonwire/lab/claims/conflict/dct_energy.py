"""conflict.2: a polar factor's DCT energy does not concentrate as a natural signal's does."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.lab import Check, Claim, Pivot, Plot, Reading, Row, Setting
from muonwire.lab.claims.conflict import NOTE
from muonwire.lab.inputs.samples import MATRICES, gaussian, real_samples
from muonwire.lab.measures.matrices import cosine_transform, energy_of_largest, energy_of_lowest
from muonwire.polar.quality import exact_factor

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
SHARE = 0.1
SIZE = 128
ORDERS = {"lowest": energy_of_lowest, "largest": energy_of_largest}


def photograph() -> Tensor:
    """scikit-learn's photograph of a Chinese palace, as grey levels.

    Raises:
        UsageError: scikit-learn or its picture is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / "datasets/images/china.jpg" if places else None
    if path is None or not path.is_file():
        raise UsageError(
            f"conflict.2: the photograph {path or 'of scikit-learn'} is not there; pip install scikit-learn, then run again"
        )
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32))


def _curves(x: Tensor) -> dict[tuple[str, float], float]:
    coefficients = cosine_transform(x)
    return {(order, s): 100 * energy(coefficients, s) for order, energy in ORDERS.items() for s in SHARES}


def measure(setting: Setting) -> Iterator[Row]:
    """Cumulative energy of the lowest and of the largest DCT coefficients; a photograph's crop without its mean brightness."""
    picture = photograph()
    generator = setting.generator(stream=1)
    top, left = (int(torch.randint(side - SIZE, (), generator=generator)) for side in picture.shape)
    crop = picture[top : top + SIZE, left : left + SIZE]
    noise = gaussian(setting, SIZE, SIZE)
    made = [("photograph", crop - crop.mean()), ("white noise", noise)]
    made.append(("polar factor of white noise", exact_factor(noise).float()))
    for data, x in real_samples(setting, kinds=("gradient", "momentum")):
        made.append((data, x))
        if "momentum" in data:
            made.append((f"polar factor of {data}", exact_factor(x).float()))
    curves = [(data, _curves(x)) for data, x in made]
    natural = curves[0][1]
    for data, curve in curves:
        for s in SHARES:
            yield {"data": data, "share": 100 * s, **{order: curve[order, s] for order in ORDERS}}
        if data != "photograph":
            yield {
                "beside the photograph": data,
                **{f"gap {order}": natural[order, SHARE] - curve[order, SHARE] for order in ORDERS},
            }
            # White noise has the share itself in any fixed order of coefficients.
            excess = (curve["lowest", SHARE] - 100 * SHARE) / (natural["lowest", SHARE] - 100 * SHARE)
            yield {"beside the photograph": data, "likeness": excess}


def _unlike(data: str, setting: str) -> Check:
    return Check(
        name="the polar factor's low frequencies are nearer to white noise's than to a photograph's",
        setting=setting,
        column="likeness",
        select={"beside the photograph": data},
        at_most=0.5,
        possible=(-1.0, 10.0),
        unit="of a photograph's excess",
        reading=Reading(
            holds="low frequencies are as rare as in noise",
            fails="low frequencies are as many as in a photograph",
            by="{mean} of a photograph’s excess over noise",
            where=f"in the {data}",
        )
        if "training" not in data
        else None,
    )


CLAIM = Claim(
    id="conflict.2",
    note=NOTE,
    says="the DCT energy of an orthogonal matrix does not concentrate in low frequencies as that of natural signals does",
    question="Which share of the energy lies in the lowest tenth of the frequencies, and in the largest tenth of "
    "the coefficients, of a photograph, white noise, a real gradient, a momentum, and their polar factors?",
    expected="Polar factors are as flat as white noise. But so are gradients and momenta before them: rows and columns of a "
    "weight have no order in which neighbours are alike, so that it is not orthogonalizing that takes low frequencies away.",
    measure=measure,
    inputs=MATRICES,
    checks=(
        _unlike("polar factor of white noise", "as in the note"),
        _unlike("polar factor of training momentum", "on real momentum, training"),
        _unlike("polar factor of language-model momentum", "on real momentum, language model"),
    ),
    meaning={
        "confirmed": "Do not count on low frequencies of a polar factor; a codec has to search for the largest coefficients and "
        "send their places. The table shows whether the gradient and the momentum before it would have had them.",
        "refuted": "A polar factor has the low frequencies of a natural picture: a codec could send those and no places.",
        "depends": "Look at your own matrices before choosing a transform.",
    },
    tables=(
        Pivot(
            caption="Share of the energy, %, in a tenth of the DCT coefficients",
            rows={"data": "Data"},
            values={"lowest": "Lowest frequencies", "largest": "Largest coefficients"},
            select={"share": 100 * SHARE},
        ),
        Pivot(
            caption="How many points less than a photograph, and the excess of the low frequencies over white "
            "noise's as a part of the photograph's: 0 as white noise, 1 as the photograph",
            rows={"beside the photograph": "Data"},
            values={"gap lowest": "Lowest", "gap largest": "Largest", "likeness": "Likeness"},
        ),
    ),
    plots=(
        Plot(
            name="lowest",
            title="Energy in the lowest frequencies",
            how_to_read="The diagonal is white noise; a curve that rises at once is a natural signal.",
            x=("share", "% of the coefficients, lowest frequencies first"),
            y=("lowest", "% of the energy"),
            series=("data", "Data"),
        ),
        Plot(
            name="largest",
            title="Energy in the largest coefficients",
            how_to_read="What top-k keeps. White noise itself lies above the diagonal here.",
            x=("share", "% of the coefficients, largest first"),
            y=("largest", "% of the energy"),
            series=("data", "Data"),
        ),
    ),
)
