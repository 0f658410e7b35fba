"""The matrices that static claims are measured on: made ones, and a part of the real ones for each seed."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from muonwire.lab import Input, Setting
from muonwire.lab.inputs.captured import captured
from muonwire.lab.inputs.language_model import LANGUAGE_MODEL
from muonwire.lab.inputs.text_training import TEXT_TRAINING

T = TypeVar("T")

REAL = {TEXT_TRAINING: "training", LANGUAGE_MODEL: "language-model"}
MATRICES = tuple(REAL)
NUM_PARTS = 5


def gaussian(setting: Setting, m: int, n: int, *, stream: int = 0) -> Tensor:
    """Independent standard normal entries, (m, n)."""
    return torch.randn(m, n, generator=setting.generator(stream=stream))


def dealt(setting: Setting, items: Sequence[T], *, num_parts: int = NUM_PARTS) -> Sequence[T]:
    """Every ``num_parts``-th item, another part for each seed."""
    return items[setting.seed % num_parts :: num_parts]


def samples_of(setting: Setting, wanted: Input, *, kind: str, num_parts: int = NUM_PARTS) -> Iterator[Tensor]:
    """Every ``num_parts``-th matrix of a kind, another part for each seed.

    Matrices of which every entry is zero are left out: they have neither direction nor spectrum.

    Args:
        setting: of the measurement.
        wanted: the input that holds them.
        kind: as in ``captured``.
        num_parts: into how many parts the matrices are dealt. Default: 5.
    """
    found = [c.matrix for c in captured(setting.input(wanted), kind=kind) if c.matrix.any()]
    yield from dealt(setting, found, num_parts=num_parts)


def real_samples(
    setting: Setting, *, kinds: Sequence[str] = ("momentum",), num_parts: int = NUM_PARTS
) -> Iterator[tuple[str, Tensor]]:
    """(what it is, matrix): the samples of each kind from training and from the language model.

    What it is reads as "training momentum" or "language-model gradient".

    Args:
        setting: of the measurement.
        kinds: as in ``captured``. Default: momentum.
        num_parts: see ``samples_of``.
    """
    for wanted, label in REAL.items():
        for kind in kinds:
            for x in samples_of(setting, wanted, kind=kind, num_parts=num_parts):
                yield f"{label} {kind}", x
