"""Edits of singular values: W = U diag(σ) Vᵀ becomes U' diag(σ') V'ᵀ.

Their text form is that of recipes: ``clip(high=2.0)``, ``keep(fraction=0.5, kind='mlp', layers='0-9')``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.recipes import format_recipe, parse_recipe
from muonwire.spectra.weights import Choice
from muonwire.tasks.base import named


class Factors(NamedTuple):
    """U (m, r), σ (r,), in no particular order after an edit, and Vᵀ (r, n), of one matrix."""

    u: Tensor
    s: Tensor
    vt: Tensor

    @property
    def product(self) -> Tensor:
        """U diag(σ) Vᵀ."""
        return (self.u * self.s) @ self.vt


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """One edit, of the weights that ``kind`` and ``layers`` choose; see ``Choice``."""

    kind: str | None = None
    layers: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for options out of range."""
        self.choice.numbers()

    @property
    def choice(self) -> Choice:
        """The weights that it changes."""
        return Choice(kind=self.kind, layers=self.layers)

    @abstractmethod
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        """The factors after the edit.

        Args:
            factors: before; σ may be in any order.
            name: of the matrix, for errors.
            seed: of this matrix.

        Raises:
            UsageError: the edit does not fit the matrix, such as k above its rank.
        """

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return format_recipe(NAMES[type(self)], given)


def _wrong(edit: Edit, allowed: str) -> UsageError:
    return UsageError(f"edit {edit}: {allowed}")


def _root_mean_square(s: Tensor) -> Tensor:
    return s.square().mean().sqrt()


def _rank_of_each(s: Tensor) -> Tensor:
    """The place of each singular value by size: 0 for the largest, 1 for the next, …"""
    ranks = torch.empty_like(s, dtype=torch.int64)
    ranks[s.argsort(descending=True, stable=True)] = torch.arange(len(s), device=s.device)
    return ranks


@dataclass(frozen=True, kw_only=True)
class Clip(Edit):
    """σ' = min(max(σ, low · c), high · c).

    Args:
        low, high: the bounds; None leaves a side open.
        of: c: "rms", the root of the mean σ²; "largest", σ₁; or "one", for bounds as they are. Default: "rms".
    """

    low: float | None = None
    high: float | None = None
    of: str = "rms"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = 0.0 if self.low is None else self.low, math.inf if self.high is None else self.high
        if (self.low is None and self.high is None) or low < 0 or high < low or self.of not in UNITS:
            raise _wrong(
                self,
                f"it takes low and high, at least one, with 0 <= low <= high, and of={' or '.join(UNITS)}",
            )

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        s = factors.s
        unit = {"rms": _root_mean_square(s), "largest": s.max(), "one": torch.ones_like(s[0])}[self.of]
        low = None if self.low is None else self.low * unit
        high = None if self.high is None else self.high * unit
        return factors._replace(s=s.clamp(min=low, max=high))


UNITS = ("rms", "largest", "one")


@dataclass(frozen=True, kw_only=True)
class Flatten(Edit):
    """σ' = c σᵖ, c such that the Frobenius norm stays: p = 1 changes nothing, 0 is ``polar``, above 1 sharpens.

    Args:
        power: p ≥ 0. Default: 0.5.
    """

    power: float = 0.5

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.power < math.inf:
            raise _wrong(self, "power must be at least 0")

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        s = factors.s
        if not float(s.max()):
            return factors
        # Relative to the largest, so that no power overflows. Zeros stay zero for every p.
        powered = torch.where(s > 0, (s / s.max()) ** self.power, torch.zeros_like(s))
        return factors._replace(s=powered * (s.norm() / powered.norm()))


@dataclass(frozen=True, kw_only=True)
class PolarFactor(Edit):
    """σ' = ‖W‖_F/√r: the polar factor at equal Frobenius norm."""

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        return factors._replace(s=_root_mean_square(factors.s).expand_as(factors.s).clone())


@dataclass(frozen=True, kw_only=True)
class Counted(Edit):
    """An edit of k of the singular values.

    Args:
        k: how many.
        fraction: or this share of r, rounded to the nearest number.
        which: "largest" or "smallest". Default: "largest".
    """

    k: int | None = None
    fraction: float | None = None
    which: str = "largest"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.k is None) == (self.fraction is None):
            raise _wrong(self, "it takes either k or fraction")
        if (self.k is not None and self.k < 0) or not 0 <= (self.fraction or 0.0) <= 1:
            raise _wrong(self, "k must be at least 0, and fraction in [0, 1]")
        if self.which not in ("largest", "smallest"):
            raise _wrong(self, "which is largest or smallest")

    def chosen(self, s: Tensor, name: str) -> Tensor:
        """A mask of the chosen singular values."""
        k = round(self.fraction * len(s)) if self.fraction is not None else self.k
        assert k is not None
        if k > len(s):
            raise _wrong(
                self, f"k is {k}, but {name} has only {len(s)} singular values; take a smaller k, or fraction"
            )
        ranks = _rank_of_each(s)
        return ranks < k if self.which == "largest" else ranks >= len(s) - k


@dataclass(frozen=True, kw_only=True)
class Keep(Counted):
    """σ' = σ for the k largest (or smallest), 0 for the others."""

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        return factors._replace(s=torch.where(self.chosen(factors.s, name), factors.s, 0))


@dataclass(frozen=True, kw_only=True)
class Drop(Counted):
    """σ' = 0 for the k largest (or smallest), σ for the others."""

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        return factors._replace(s=torch.where(self.chosen(factors.s, name), 0, factors.s))


@dataclass(frozen=True, kw_only=True)
class Scale(Edit):
    """σ' = factor · σ for the singular values whose place is in [start, stop), by size; the others stay.

    Args:
        factor: any finite number. Default: 2.
        start, stop: places as a share of r, 0 the largest, 1 past the smallest. Default: 0 and 0.1.
    """

    factor: float = 2.0
    start: float = 0.0
    stop: float = 0.1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start < self.stop <= 1 or not 0 <= self.factor < math.inf:
            raise _wrong(self, "0 <= start < stop <= 1 and a finite factor of at least 0 are wanted")

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        s = factors.s
        place = _rank_of_each(s) / len(s)
        return factors._replace(
            s=torch.where((place >= self.start) & (place < self.stop), self.factor * s, s)
        )


@dataclass(frozen=True, kw_only=True)
class Permute(Edit):
    """The same singular values on other singular vectors: σ'ᵢ = σ_{π(i)}, π random. A control.

    Args:
        seed: of π. Default: 0.
    """

    seed: int = 0

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        order = torch.randperm(len(factors.s), generator=_generator(self.seed, seed))
        return factors._replace(s=factors.s[order.to(factors.s.device)])


@dataclass(frozen=True, kw_only=True)
class Rotate(Edit):
    """The same singular values on random singular vectors, uniform over all of them: U' and V' of Gaussian matrices. A control.

    Args:
        side: "left", "right" or "both". Default: "both".
        seed: of the vectors. Default: 0.
    """

    side: str = "both"
    seed: int = 0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in ("left", "right", "both"):
            raise _wrong(self, "side is left, right or both")

    @override
    def apply(self, factors: Factors, *, name: str, seed: int) -> Factors:
        generator = _generator(self.seed, seed)
        u = _random_columns(factors.u, generator) if self.side != "right" else factors.u
        vt = _random_columns(factors.vt.mT, generator).mT if self.side != "left" else factors.vt
        return Factors(u=u, s=factors.s, vt=vt)


def _random_columns(like: Tensor, generator: torch.Generator) -> Tensor:
    x = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(x)
    # Without the signs, Q is not uniform over the orthonormal matrices (Mezzadri 2007).
    columns: Tensor = q * r.diagonal().sign()
    return columns.to(like)


def _generator(*seeds: int) -> torch.Generator:
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


EDITS: dict[str, type[Edit]] = {
    "clip": Clip,
    "flatten": Flatten,
    "polar": PolarFactor,
    "keep": Keep,
    "drop": Drop,
    "scale": Scale,
    "permute": Permute,
    "rotate": Rotate,
}
NAMES = {edit: name for name, edit in EDITS.items()}


def parse_edit(text: str) -> Edit:
    """Read "clip(high=2.0)" or "keep(fraction=0.5, kind='mlp', layers='0-9')".

    >>> str(parse_edit("keep(fraction=0.5, kind='mlp')"))
    "keep(kind='mlp', fraction=0.5)"

    Raises:
        UsageError: the text has another form, names an unknown edit or option, or has a value out of range.
    """
    name, options = parse_recipe(text)
    kind = named("edit", name, EDITS)
    known = [f.name for f in fields(kind)]
    unknown = [o for o in options if o not in known]
    if unknown:
        raise UsageError(f"edit {name}: option {unknown[0]!r} is unknown; allowed are {', '.join(known)}")
    _check_types(name, options)
    return kind(**options)


def _check_types(name: str, options: dict[str, Any]) -> None:
    numbers = {f.name: getattr(f.type, "__name__", str(f.type)) for f in fields(EDITS[name])}
    for option, value in options.items():
        kind = numbers[option]
        good = (
            (value is None and "None" in kind)
            or ("str" in kind and isinstance(value, str))
            or ("int" in kind and isinstance(value, int) and not isinstance(value, bool))
            or ("float" in kind and isinstance(value, int | float) and not isinstance(value, bool))
        )
        if not good:
            raise UsageError(f"edit {name}: {option} is {value!r}; it takes {kind}")


def parse_edits(texts: Sequence[str]) -> tuple[Edit, ...]:
    """Several edits, applied one after the other; see ``parse_edit``."""
    return tuple(parse_edit(text) for text in texts)
