"""The weight matrices of a model: their kinds, groups and layers, and how some of them are chosen."""

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim import Route
from muonwire.optim.routing import survey

ATTENTION = re.compile(r"attn|attention|(^|\.)(q|k|v|o|query|key|value)(_proj)?(\.|$)")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter that is a matrix, or a stack of them.

    Args:
        name: as ``named_parameters`` gives it, tied ones under their first name.
        kind: the last part of its module's name, such as "q_proj" or "c_fc".
        group: "attention", "mlp", "router", "embedding", "head" or "other".
        layer: the number of the layer; None outside of them.
        route: its role in training, and its layout as matrices.
    """

    name: str
    kind: str
    group: str
    layer: int | None
    route: Route

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Its matrices (m, n) by name; views of the parameter, so that writing into them changes it.

        The stacked experts of a mixture, and the parts of a fused weight that routing splits, are one matrix each, named name[0],
        name[1], …
        """
        param = self.route.param.detach()
        (stack,) = self.route.layout.split(param)
        assert stack.data_ptr() == param.data_ptr()
        if stack.ndim == 2:
            yield self.name, stack
            return
        # Flattening would copy where the leading dimensions are strided.
        for index, at in enumerate(itertools.product(*map(range, stack.shape[:-2]))):
            yield f"{self.name}[{index}]", stack[at]


def weights_of(model: nn.Module) -> list[Weight]:
    """The weight matrices of a model: hidden ones, embeddings, heads and routers, and those of unknown classes; not norms, biases
    and vectors.

    Args:
        model: any module.

    Raises:
        UsageError: none of its parameters is a matrix.
    """
    found = []
    for r, _, _ in survey(model):
        if r.role not in ("hidden", "embedding", "head", "router", "unknown") or r.param.ndim < 2:
            continue
        if r.layout.kind == "matrix" and r.param.ndim > 2:
            continue  # a stack whose matrices are unknown
        # What a transformers model calls itself, such as "vit", says nothing about a layer.
        parts = [p for p in r.name.split(".") if p != "weight"]
        kind = parts[-1]
        layer = _LAYER.search(r.name)
        number = int(layer[1]) if layer and r.role in ("hidden", "router", "unknown") else None
        found.append(Weight(name=r.name, kind=kind, group=_group(r, kind), layer=number, route=r))
    if not found:
        raise UsageError(f"weights: none of the trainable parameters of {type(model).__name__} is a matrix")
    return found


def _group(r: Route, kind: str) -> str:
    if r.role != "hidden":
        return "other" if r.role == "unknown" else r.role
    if ATTENTION.search(r.name):
        return "attention"
    return "mlp" if re.search(r"mlp|ffn|feed_forward|fc|expert|intermediate|dense", r.name) else "other"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A choice of weights.

    Args:
        kind: a kind or a group, or a pattern of them such as "*_proj". Default: all hidden matrices, which leaves out
            embeddings, heads and routers.
        layers: numbers and ranges, such as "0-9" or "0,4,20-29". Default: all.
    """

    kind: str | None = None
    layers: str | None = None

    def __post_init__(self) -> None:
        self.numbers()

    def numbers(self) -> set[int] | None:
        """The layers that ``layers`` names; None for all.

        Raises:
            UsageError: it does not parse.
        """
        if self.layers is None:
            return None
        chosen: set[int] = set()
        for part in str(self.layers).split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None or (match[2] and int(match[2]) < int(match[1])):
                raise UsageError(
                    f"layers: {self.layers!r} does not parse; write numbers and ranges, such as '0-9' or '0,4,20-29'"
                )
            chosen |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        return chosen

    def takes(self, weight: Weight) -> bool:
        """Whether a weight is chosen."""
        numbers = self.numbers()
        if numbers is not None and weight.layer not in numbers:
            return False
        if self.kind is None:
            return weight.route.role == "hidden"
        return any(fnmatch.fnmatchcase(name, self.kind) for name in (weight.kind, weight.group))

    def of(self, weights: Sequence[Weight]) -> list[Weight]:
        """The chosen ones of ``weights``.

        Raises:
            UsageError: there are none; the message lists near names.
        """
        chosen = [w for w in weights if self.takes(w)]
        if chosen:
            return chosen
        kinds = list(dict.fromkeys([w.kind for w in weights] + [w.group for w in weights]))
        layers = sorted({w.layer for w in weights if w.layer is not None})
        near = difflib.get_close_matches(self.kind or "", kinds, n=5, cutoff=0.4) or kinds
        numbers = f"layers go from {layers[0]} to {layers[-1]}" if layers else "there are no layers"
        raise UsageError(
            f"weights: kind={self.kind!r} and layers={self.layers!r} match none of {len(weights)} matrices; "
            f"{'near kinds are' if near != kinds else 'kinds are'} {', '.join(near)}; {numbers}"
        )


def doubled(matrix: Tensor) -> Tensor:
    """The matrix in float64, on the CPU where the device has no float64."""
    return matrix.cpu().double() if matrix.device.type == "mps" else matrix.double()


def check_finite(name: str, matrix: Tensor) -> None:
    """Raise UsageError where a matrix holds NaN or infinity."""
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise UsageError(
            f"weights: {name} holds {bad} values of {matrix.numel()} that are NaN or infinite; its singular values are not "
            "defined. Take an earlier checkpoint"
        )
