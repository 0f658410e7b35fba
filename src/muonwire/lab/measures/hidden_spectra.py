"""Spectra of a model's hidden weights: those of its attention and its MLPs."""

from typing import Any

from torch import nn

from muonwire.spectra.measure import measure

HIDDEN = ("attention", "mlp")


def hidden_spectra(model: nn.Module, *, label: str) -> list[dict[str, Any]]:
    """What ``muonwire.spectra.measure`` finds, a row for each hidden matrix."""
    return [s for s in measure(model, label=label).matrices.to_dicts() if s["group"] in HIDDEN]
