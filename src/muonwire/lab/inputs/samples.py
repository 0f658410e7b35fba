"""The matrices that static claims are measured on: made ones, and a part of the real ones for each seed."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from muonwire.lab.engine.claim import Setting
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from muonwire.lab.inputs.text_training import TEXT_TRAINING

REAL = {TEXT_TRAINING: "training", LANGUAGE_MODEL: "language-model"}
MATRICES = tuple(REAL)
NUM_PARTS = 5


def gaussian(setting: Setting, m: int, n: int, *, stream: int = 0) -> Tensor:
    """Independent standard normal entries, (m, n)."""
    return torch.randn(m, n, generator=setting.generator(stream=stream))


def real_samples(
    setting: Setting, *, kinds: Sequence[str] = ("momentum",), num_parts: int = NUM_PARTS
) -> Iterator[tuple[str, Tensor]]:
    """(what it is, matrix): every ``num_parts``-th real matrix of each kind, another part for each seed.

    What it is reads as "training momentum" or "language-model gradient". Matrices of which every entry is zero are left out: they
    have neither direction nor spectrum.

    Args:
        setting: of the measurement.
        kinds: as in ``captured``. Default: momentum.
        num_parts: into how many parts the matrices of an input and kind are dealt. Default: 5.
    """
    for name, label in REAL.items():
        for kind in kinds:
            found = [c.matrix for c in captured(setting.input(name), kind=kind) if c.matrix.any()]
            yield from ((f"{label} {kind}", x) for x in found[setting.seed % num_parts :: num_parts])
