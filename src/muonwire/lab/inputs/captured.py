"""Matrices of real training, as inputs keep them in a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.lab.engine.input import write_about

MATRICES = "matrices.safetensors"
BETA = 0.95
# Batches whose gradients are kept apart, as replicas have them.
NUM_REPLICAS = 8


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One real matrix.

    Args:
        point: when it was taken, such as "step 200", or "pretrained".
        kind: "gradient", "momentum" (β = 0.95), "change" of the weight over ten steps, or "weight".
        layer: name of the parameter.
        replica: whose batch the gradient is of; None for what all batches made together.
        matrix: (m, n), float32.
    """

    point: str
    kind: str
    layer: str
    replica: int | None
    matrix: Tensor


def captured(
    folder: Path, *, kind: str | None = None, point: str | None = None, replicas: bool = False
) -> Iterator[Captured]:
    """The matrices of an input.

    Args:
        folder: of the input.
        kind: only these. Default: all.
        point: only of this point. Default: all.
        replicas: give the gradients of single replicas' batches instead of what all batches made together.

    Raises:
        UsageError: there are none such.
    """
    found = False
    for name, matrix in sorted(load_file(folder / MATRICES).items()):
        at, what, layer, replica = name.split("|")
        if kind not in (None, what) or point not in (None, at) or replicas != (replica != ""):
            continue
        found = True
        yield Captured(
            point=at, kind=what, layer=layer, replica=int(replica) if replica else None, matrix=matrix.float()
        )
    if not found:
        raise UsageError(f"input: {folder} holds no matrices of kind {kind} at {point}")


def key(point: str, kind: str, layer: str, replica: int | None = None) -> str:
    """The name of a matrix in the file."""
    return f"{point}|{kind}|{layer}|{'' if replica is None else replica}"


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices that Muon is for, by their short names."""
    return {
        short_name(name): p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "head" not in name
    }


def short_name(name: str) -> str:
    """A parameter's name without what all have: the leading "model." and the trailing ".weight"."""
    return name.removeprefix("model.").removesuffix(".weight")


def write(folder: Path, matrices: dict[str, Tensor], about: dict[str, object]) -> None:
    """Write matrices, in bfloat16 as gradients are computed, and what they are."""
    save_file(
        {name: t.to(torch.bfloat16).cpu().contiguous() for name, t in matrices.items()}, folder / MATRICES
    )
    write_about(folder, about)
