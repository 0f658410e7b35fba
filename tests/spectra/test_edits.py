"""What each edit does to singular values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muonwire.errors import UsageError
from muonwire.spectra.edit import decompose, edited
from muonwire.spectra.edits import EDITS, parse_edit
from muonwire.spectra.measure import singular_values

SHAPES = ((6, 6), (4, 9), (9, 4), (1, 5), (5, 1))
# One of every edit, as text, with the singular values that it asks of (4, 2, 1, 1).
WANTED = {
    "clip(high=2.0, of='one')": (2.0, 2.0, 1.0, 1.0),
    "clip(low=0.5, of='largest')": (4.0, 2.0, 2.0, 2.0),
    "flatten(power=1.0)": (4.0, 2.0, 1.0, 1.0),
    "flatten(power=2.0)": tuple(v * math.sqrt(22 / 274) for v in (16.0, 4.0, 1.0, 1.0)),
    "polar": (math.sqrt(22 / 4),) * 4,
    "keep(k=1)": (4.0, 0.0, 0.0, 0.0),
    "keep(fraction=0.5, which='smallest')": (1.0, 1.0, 0.0, 0.0),
    "drop(k=1)": (2.0, 1.0, 1.0, 0.0),
    "drop(fraction=0.5, which='smallest')": (4.0, 2.0, 0.0, 0.0),
    "scale(factor=3.0, start=0.0, stop=0.5)": (12.0, 6.0, 1.0, 1.0),
    "permute": (4.0, 2.0, 1.0, 1.0),
    "rotate": (4.0, 2.0, 1.0, 1.0),
}


def _with_values(values: tuple[float, ...], rows: int, columns: int) -> Tensor:
    r = min(rows, columns)
    u = torch.linalg.qr(torch.randn(rows, r, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, r, dtype=torch.float64)).Q
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.mT


@pytest.mark.parametrize("text", WANTED)
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (4, 4)])
def test_an_edit_gives_the_singular_values_it_asks_for(text: str, shape: tuple[int, int]) -> None:
    """Their sizes, whatever order and vectors they come out on."""
    torch.manual_seed(0)
    x = _with_values((4.0, 2.0, 1.0, 1.0), *shape)
    made = edited("w", decompose("w", x), [parse_edit(text)]).product
    assert torch.allclose(
        singular_values("w", made), torch.tensor(WANTED[text], dtype=torch.float64), atol=1e-12
    )


def test_every_edit_is_tried_above() -> None:
    """None is left out of the table."""
    assert {t.split("(")[0] for t in WANTED} == set(EDITS)


@pytest.mark.parametrize("text", WANTED)
def test_the_text_of_an_edit_reads_back(text: str) -> None:
    """With its kind and layers."""
    name, _, rest = text.partition("(")
    longer = f"{name}(kind='mlp', layers='0-3,7'{', ' + rest if rest else ')'}"
    edit = parse_edit(longer)
    assert parse_edit(str(edit)) == edit
    assert (edit.kind, edit.choice.numbers()) == ("mlp", {0, 1, 2, 3, 7})


@pytest.mark.parametrize("text", ["keep(k=2)", "clip(high=1.5)", "flatten(power=0.5)", "scale"])
def test_only_singular_values_change(text: str) -> None:
    """U and V stay: Uᵀ W' V is diagonal."""
    torch.manual_seed(1)
    factors = decompose("w", torch.randn(5, 8))
    made = edited("w", factors, [parse_edit(text)]).product
    middle = factors.u.mT @ made @ factors.vt.mT
    assert torch.allclose(middle, torch.diag(middle.diagonal()), atol=1e-12)


@pytest.mark.parametrize("text", ["permute", "rotate", "rotate(side='left')", "rotate(side='right')"])
def test_controls_are_drawn_by_seed_and_matrix(text: str) -> None:
    """The same seed and name: the same; another seed or name: another one. And they do change the matrix."""
    torch.manual_seed(2)
    factors = decompose("w", torch.randn(6, 8))
    name, _, rest = text.partition("(")
    other = f"{name}(seed=1{', ' + rest if rest else ')'}"
    one = edited("a", factors, [parse_edit(text)]).product
    assert torch.equal(one, edited("a", factors, [parse_edit(text)]).product)
    for different in (
        edited("b", factors, [parse_edit(text)]),
        edited("a", factors, [parse_edit(other)]),
        factors,
    ):
        assert not torch.allclose(one, different.product, atol=1e-3)


def test_rotating_one_side_keeps_the_other() -> None:
    """The left side's vectors move, the right side's stay, and the other way round."""
    torch.manual_seed(3)
    factors = decompose("w", torch.randn(4, 9))
    left = edited("w", factors, [parse_edit("rotate(side='left')")])
    right = edited("w", factors, [parse_edit("rotate(side='right')")])
    assert torch.equal(left.vt, factors.vt)
    assert torch.equal(right.u, factors.u)
    assert torch.allclose(left.u.mT @ left.u, torch.eye(4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(right.vt @ right.vt.mT, torch.eye(4, dtype=torch.float64), atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHAPES), st.floats(0.0, 3.0), st.integers(0, 1000))
def test_flatten_keeps_the_frobenius_norm(shape: tuple[int, int], power: float, seed: int) -> None:
    """At any power."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = edited("w", decompose("w", x), [parse_edit(f"flatten(power={power!r})")]).product
    assert float(made.norm()) == pytest.approx(float(x.norm()), rel=1e-9)


def test_keep_and_drop_are_each_others_complement() -> None:
    """keep(k) + drop(k) = W."""
    torch.manual_seed(4)
    factors = decompose("w", torch.randn(7, 5))
    kept = edited("w", factors, [parse_edit("keep(k=2)")]).product
    dropped = edited("w", factors, [parse_edit("drop(k=2)")]).product
    assert torch.allclose(kept + dropped, factors.product, atol=1e-12)


def test_edits_follow_one_another() -> None:
    """Each sees what the one before left."""
    torch.manual_seed(5)
    factors = decompose("w", torch.randn(6, 6))
    both = edited("w", factors, [parse_edit("permute"), parse_edit("keep(k=2)")])
    assert torch.equal(both.s.sort(descending=True).values[:2], factors.s[:2])
    assert int((both.s > 0).sum()) == 2


def test_a_zero_matrix_stays_zero() -> None:
    """Nothing divides by its largest singular value."""
    for text in WANTED:
        if text.startswith("clip(low=0.5"):
            continue
        made = edited(
            "w", decompose("w", torch.zeros(3, 4)), [parse_edit(text)] if "k=" not in text else []
        ).product
        assert not made.any(), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharpen", "'sharpen' is unknown; allowed are clip, flatten"),
        ("keep", "either k or fraction"),
        ("keep(k=2, fraction=0.5)", "either k or fraction"),
        ("keep(k=0.5)", "k is 0.5; it takes int"),
        ("keep(k=True)", "k is True"),
        ("drop(fraction=1.5)", "fraction in \\[0, 1\\]"),
        ("drop(k=-1)", "at least 0"),
        ("keep(k=1, which='middle')", "largest or smallest"),
        ("clip", "low and high, at least one"),
        ("clip(low=2.0, high=1.0)", "low <= high"),
        ("clip(high=1.0, of='median')", "rms or largest or one"),
        ("flatten(power=-1.0)", "at least 0"),
        ("flatten(power='x')", "power is 'x'; it takes float"),
        ("scale(start=0.5, stop=0.5)", "start < stop"),
        ("rotate(side='up')", "left, right or both"),
        ("polar(strength=1)", "option 'strength' is unknown; allowed are kind, layers"),
        ("polar(layers='9-1')", "write numbers and ranges"),
        ("polar(", "does not parse"),
    ],
)
def test_a_wrong_edit_is_refused(text: str, message: str) -> None:
    """By what was received and what is allowed."""
    with pytest.raises(UsageError, match=message):
        parse_edit(text)


def test_k_above_the_rank_is_refused() -> None:
    """With the matrix and how many it has."""
    with pytest.raises(UsageError, match=r"k is 5, but layers\.0\.w has only 4 singular values"):
        edited("layers.0.w", decompose("w", torch.randn(4, 9)), [parse_edit("drop(k=5)")])
