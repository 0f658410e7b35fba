"""Routing: from a model's parameters to the groups that treat them.

Hidden matrices go to the polar chain; embeddings, output heads, norms, biases, vectors, grouped, depthwise and transposed
convolutions and recurrent weights to Adam. What is in doubt is an error rather than a guess, because training silently without
orthogonalization is what Muon's users complain of most.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.stages.layout import MatrixLayout

# The last part of a linear layer's name that makes it a head, outside numbered layers.
HEAD_NAMES = (
    *(
        "lm_head",
        "head",
        "heads",
        "classifier",
        "score",
        "embed_out",
        "output_projection",
        "unembed",
        "unembedding",
    ),
    *("output", "to_logits", "logits", "out_head", "qa_outputs", "lm_logits"),
)
# Learned vectors that a module holds as bare parameters: class, mask and register tokens, and positions.
EMBEDDING_NAMES = re.compile(r"(_tokens?|pos(ition|itional)?_emb(ed(ding)?s?)?)$")
# Mamba's and RWKV's parameters of the recurrence, an entry for each state and not a map between them.
STATE_SPACE_NAMES = re.compile(r"^(A_log|A|D|dt_bias|time_\w+)$")
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one parameter goes.

    Args:
        name: as ``named_parameters`` gives it (tied parameters under their first name).
        param: the parameter.
        role: "hidden", "embedding", "head", "norm", "bias", "vector", "grouped" (a convolution whose filters do not see all
            inputs), "transposed" (a transposed convolution), "recurrent", "state space" or "other". A matrix of one row or
            column is a vector.
        polar: whether it is orthogonalized.
        layout: how it is seen as matrices.
    """

    name: str
    param: Tensor
    role: str
    polar: bool
    layout: MatrixLayout


@dataclass(frozen=True, kw_only=True)
class Routing:
    """All trainable parameters of a model, each routed once. ``str()`` is a table."""

    routes: tuple[Route, ...]

    @property
    def polar(self) -> list[Route]:
        """Those that are orthogonalized."""
        return [r for r in self.routes if r.polar]

    @property
    def adam(self) -> list[Route]:
        """The others."""
        return [r for r in self.routes if not r.polar]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "role", "treated by", "as matrices")]
        for r in self.routes:
            shape = tuple(r.param.shape)
            matrices = "x".join(map(str, r.layout.matrices_shape(shape))) if r.polar else ""
            rows.append((r.name, "x".join(map(str, shape)), r.role, "polar" if r.polar else "adam", matrices))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        count, total = sum(r.param.numel() for r in self.polar), sum(r.param.numel() for r in self.routes)
        lines.append(
            f"{len(self.polar)} of {len(self.routes)} tensors orthogonalized: {count:,} of {total:,} parameters "
            f"({100 * count / total:.1f} %)"
        )
        return "\n".join(lines)


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[str, str, nn.Module]]]:
    owners: dict[Tensor, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            owners.setdefault(param, []).append((module_name, name, module))
    return owners


def _is_head(model: nn.Module, module_name: str, module: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        try:
            if get() is module:
                return True
        except (NotImplementedError, AttributeError):
            pass  # transformers' base models have the method without a head behind it
    *path, last = module_name.split(".")
    # A numbered layer's "output" is its own, not the model's.
    return last in HEAD_NAMES and not any(part.isdigit() for part in path)


def _role(model: nn.Module, owner: tuple[str, str, nn.Module], param: Tensor) -> tuple[str, MatrixLayout]:
    module_name, name, module = owner
    if isinstance(module, EMBEDDINGS) or (
        type(module).__name__.lower().endswith(("embedding", "embeddings")) and param.ndim == 2
    ):
        return "embedding", MatrixLayout()
    if EMBEDDING_NAMES.search(name):
        return "embedding", MatrixLayout(kind="batch") if param.ndim == 3 else MatrixLayout()
    if "norm" in type(module).__name__.lower():
        return "norm", MatrixLayout()
    if name.endswith("bias"):
        return "bias", MatrixLayout()
    if _is_head(model, module_name, module):
        return "head", MatrixLayout()
    if param.ndim < 2 or (param.ndim == 2 and min(param.shape) == 1):
        return "vector", MatrixLayout()
    if STATE_SPACE_NAMES.search(name):
        return "state space", MatrixLayout()
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent", MatrixLayout()
    if isinstance(module, TRANSPOSED):
        return "transposed", MatrixLayout()
    if isinstance(module, CONVOLUTIONS):
        return ("hidden" if module.groups == 1 else "grouped"), MatrixLayout(kind="conv")
    if param.ndim == 2:
        return "hidden", MatrixLayout()
    # Three dimensions outside a convolution are stacked matrices, such as a mixture's experts; more have no usual meaning.
    return ("hidden", MatrixLayout(kind="batch")) if param.ndim == 3 else ("other", MatrixLayout())


def _matches(patterns: Iterable[str], names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def route(
    model: nn.Module,
    *,
    polar: Sequence[str] = (),
    adam: Sequence[str] = (),
    split: dict[str, int] | None = None,
) -> Routing:
    """Route every trainable parameter of ``model``.

    Args:
        model: any module; heads of ``transformers`` models are found through ``get_output_embeddings``, others by their name.
        polar: regular expressions; parameters whose name matches are orthogonalized whatever their role.
        adam: likewise, to Adam.
        split: regular expression to number of equal parts along dimension 0, for fused weights: ``{"qkv": 3}``.

    Raises:
        UsageError: no parameter would be orthogonalized; a parameter matches both ``polar`` and ``adam``, or two entries of
            ``split``; a head tied to an embedding would be treated in two ways; a pattern that matches nothing.

    >>> print(route(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False))))
    parameter  shape  role       treated by  as matrices
    0.weight   8x4    embedding  adam
    1.weight   4x4    hidden     polar       4x4
    1 of 2 tensors orthogonalized: 16 of 48 parameters (33.3 %)
    """
    split = split or {}
    routes: list[Route] = []
    unmatched = {*polar, *adam, *split}
    for param, owners in _owners(model).items():
        if not param.requires_grad:
            continue
        names = [f"{module_name}.{name}".lstrip(".") for module_name, name, _ in owners]
        roles = [_role(model, owner, param) for owner in owners]
        role, layout = min(roles, key=lambda r: r[0] == "hidden")
        unmatched -= {p for p in unmatched if _matches([p], names)}
        wants_polar, wants_adam = _matches(polar, names), _matches(adam, names)
        if wants_polar and wants_adam:
            raise UsageError(
                f"routing: {names[0]!r} matches both polar={list(polar)} and adam={list(adam)}; a parameter belongs to one group"
            )
        if wants_polar and len(names) > 1 and any(r != "hidden" for r, _ in roles):
            raise UsageError(
                f"routing: {' and '.join(names)} are one tied parameter, used as {' and '.join(r for r, _ in roles)}; "
                "it would be split between Adam and polar. Leave it to Adam, or untie it"
            )
        parts = [n for pattern, n in split.items() if _matches([pattern], names)]
        if len(parts) > 1:
            raise UsageError(
                f"routing: {names[0]!r} matches {len(parts)} entries of split={split}; one is allowed"
            )
        to_polar = wants_polar or (role == "hidden" and not wants_adam)
        if parts:
            layout = MatrixLayout(kind=layout.kind, parts=parts[0])
        if to_polar:
            layout.matrices_shape(tuple(param.shape))
        routes.append(Route(name=names[0], param=param, role=role, polar=to_polar, layout=layout))
    if unmatched:
        raise UsageError(
            f"routing: {sorted(unmatched)} match no trainable parameter; the names are "
            + ", ".join(r.name for r in routes[:8])
            + (", ..." if len(routes) > 8 else "")
        )
    if not any(r.polar for r in routes):
        raise UsageError(
            f"routing: none of {len(routes)} trainable parameters would be orthogonalized; Muon needs hidden matrices. Name them "
            "with polar=[pattern], or use the adamw recipe"
        )
    return Routing(routes=tuple(routes))
