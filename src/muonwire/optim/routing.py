"""Routing: from a model's parameters to the groups that treat them.

Hidden matrices go to the polar chain: the weights of linear layers and of convolutions, attention's fused inputs and stacks of
experts. What is known to be something else goes to Adam: embeddings, output heads, norms, biases, vectors, routers, grouped and
transposed convolutions, recurrent and state-space weights. A matrix of an unknown class is in doubt, which is an error rather
than a guess, because training without orthogonalization and without a notice is what users of Muon complain of most.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from muonwire.errors import UsageError
from muonwire.optim.roles import Roles, owners_of
from muonwire.stages.layout import MatrixLayout, parse_parts

# The parts that a fused weight is split into, as ``parse_parts`` takes them.
Parts = int | Sequence[int] | str


@dataclass(frozen=True, kw_only=True)
class Route:
    """Where one parameter goes.

    Args:
        name: as ``named_parameters`` gives it (tied parameters under their first name).
        param: the parameter.
        role: "hidden", "embedding" (tables, positions, tokens, linear layers that read patches), "head", "norm", "bias", "vector"
            (also a matrix of one row or column), "router", "grouped" (a convolution whose filters do not see all inputs),
            "transposed" (a transposed convolution), "recurrent", "state space", "reparametrized" (stored as several tensors, as
            weight normalization does) or "unknown".
        polar: whether it is orthogonalized.
        layout: how it is seen as matrices.
        kind: the class of the module that holds it.
    """

    name: str
    param: Tensor
    role: str
    polar: bool
    layout: MatrixLayout
    kind: str


@dataclass(frozen=True, kw_only=True)
class Routing:
    """All trainable parameters of a model, each routed once. ``str()`` is a table."""

    routes: tuple[Route, ...]

    @property
    def polar(self) -> list[Route]:
        """The routes of parameters that are orthogonalized."""
        return [r for r in self.routes if r.polar]

    @property
    def adam(self) -> list[Route]:
        """The routes of all other parameters."""
        return [r for r in self.routes if not r.polar]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "role", "treated by", "as matrices")]
        for r in self.routes:
            shape = "x".join(map(str, r.param.shape)) or "scalar"
            rows.append((r.name, shape, r.role, "polar" if r.polar else "adam", _matrices(r)))
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


def _matrices(r: Route) -> str:
    if not r.polar:
        return ""
    shapes = ["x".join(map(str, s)) for s in r.layout.shapes(tuple(r.param.shape))]
    return (
        " + ".join(shapes) + " transposed" * r.layout.transposed + " interleaved" * bool(r.layout.interleaved)
    )


def _matches(patterns: Iterable[str], names: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns for name in names)


def survey(model: nn.Module) -> list[tuple[Route, list[str], list[str]]]:
    """The route of each trainable parameter by its role alone, with all its names and its role under each."""
    roles = Roles(model)
    found = []
    for param, owners in owners_of(model).items():
        if not param.requires_grad:
            continue
        names = [f"{module_name}.{name}".lstrip(".") for module_name, name, _ in owners]
        judged = [roles.of(owner, param) for owner in owners]
        # A tied parameter is hidden, or in doubt, only where it is so under all its names.
        at = min(range(len(owners)), key=lambda i: ("hidden", "unknown").count(judged[i][0]))
        role, layout = judged[at]
        kind = type(owners[at][2]).__name__
        route = Route(name=names[0], param=param, role=role, polar=role == "hidden", layout=layout, kind=kind)
        found.append((route, names, [r for r, _ in judged]))
    return found


def route(
    model: nn.Module,
    *,
    polar: Sequence[str] = (),
    adam: Sequence[str] = (),
    split: Mapping[str, Parts] | None = None,
) -> Routing:
    """Route every trainable parameter of ``model``.

    Args:
        model: any module; heads of ``transformers`` models are found through ``get_output_embeddings``, others by their name.
        polar: regular expressions; parameters whose name matches are orthogonalized whatever their role.
        adam: likewise, to Adam.
        split: regular expression to the parts of fused weights along their outputs, each a matrix of its own: their number where
            they are equal, {"qkv": 3}; their sizes, {"qkv": (64, 16, 16)}; "2 interleaved" where rows 0, 2, 4, … are one part
            and 1, 3, 5, … the other, "3 interleaved by 64" where the parts take turns 64 rows at a time, as in attention that
            is fused head by head. Experts' gate and up, and the inputs of torch's attention, split by themselves.

    Raises:
        UsageError: matrices of unknown classes, which no pattern decides; no parameter would be orthogonalized; a parameter
            matches both ``polar`` and ``adam``, or two entries of ``split``; a head tied to an embedding would be treated in two
            ways; a pattern that matches nothing.

    >>> print(route(nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4, bias=False))))
    parameter  shape  role       treated by  as matrices
    0.weight   8x4    embedding  adam
    1.weight   4x4    hidden     polar       4x4
    1 of 2 tensors orthogonalized: 16 of 48 parameters (33.3 %)
    """
    split = split or {}
    routes: list[Route] = []
    unmatched = {*polar, *adam, *split}
    doubtful = []
    for found, names, roles in survey(model):
        unmatched -= {p for p in unmatched if _matches([p], names)}
        wants_polar, wants_adam = _matches(polar, names), _matches(adam, names)
        if wants_polar and wants_adam:
            raise UsageError(
                f"routing: {names[0]!r} matches both polar={list(polar)} and adam={list(adam)}; a parameter belongs to one group"
            )
        if wants_polar and len(names) > 1 and any(r != "hidden" for r in roles):
            raise UsageError(
                f"routing: {' and '.join(names)} are one tied parameter, used as {' and '.join(roles)}; "
                "it would be split between Adam and polar. Leave it to Adam, or untie it"
            )
        parts = [wanted for pattern, wanted in split.items() if _matches([pattern], names)]
        if len(parts) > 1:
            raise UsageError(
                f"routing: {names[0]!r} matches {len(parts)} entries of split={split}; one is allowed"
            )
        if found.role == "unknown" and not (wants_polar or wants_adam):
            doubtful.append(found)
        layout = _with_parts(found.layout, parts[0]) if parts else found.layout
        to_polar = wants_polar or (found.polar and not wants_adam)
        if to_polar:
            layout.shapes(tuple(found.param.shape))
        routes.append(replace(found, polar=to_polar, layout=layout))
    if unmatched:
        raise UsageError(
            f"routing: {sorted(unmatched)} match no trainable parameter; the names are "
            + ", ".join(r.name for r in routes[:8])
            + (", ..." if len(routes) > 8 else "")
        )
    if doubtful:
        raise UsageError(_doubts(doubtful))
    if not any(r.polar for r in routes):
        raise UsageError(
            f"routing: none of {len(routes)} trainable parameters would be orthogonalized; Muon needs hidden matrices. Name them "
            "with polar=[pattern], or use the adamw recipe"
        )
    return Routing(routes=tuple(routes))


def _with_parts(layout: MatrixLayout, wanted: Parts) -> MatrixLayout:
    parts, interleaved = parse_parts(wanted)
    if parts == layout.parts and layout.interleaved and isinstance(wanted, int):
        return layout  # a number alone leaves the known order of the parts as it is
    return replace(layout, parts=parts, interleaved=interleaved)


def _doubts(doubtful: Sequence[Route]) -> str:
    """One message for all parameters in doubt; those that differ in their layers' numbers alone are one entry."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Route]] = {}
    for r in doubtful:
        alike.setdefault((re.sub(r"\d+", "0", r.name), r.kind, tuple(r.param.shape)), []).append(r)
    entries = [
        f"{group[0].name} ({kind}, {'x'.join(map(str, shape))})"
        + (f" and {len(group) - 1} alike" if len(group) > 1 else "")
        for (_, kind, shape), group in alike.items()
    ]
    pattern = re.escape(".".join(doubtful[0].name.split(".")[-2:])) + "$"
    return (
        f"routing: whether these are hidden matrices is in doubt, since their classes are not known: {'; '.join(entries)}. Decide "
        f"by regular expressions: polar=[{pattern!r}, ...] orthogonalizes, adam=[{pattern!r}, ...] leaves to Adam"
    )
