"""Layouts: what they split a parameter into, and that each part is treated as the matrix that it is."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from muonwire import recipes, stages
from muonwire.errors import UsageError
from muonwire.stages.layout import MatrixLayout
from muonwire.transport import SingleReplica


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A layout, the shape of a parameter, and what it is split into.
SPLITS = [
    ("matrix", (6, 4), [(6, 4)]),
    ("conv", (6, 4, 3, 2), [(6, 24)]),
    ("batch", (5, 6, 4), [(5, 6, 4)]),
    ("matrix/3", (6, 4), [(3, 2, 4)]),
    ("batch/2", (5, 6, 4), [(5, 2, 3, 4)]),
    ("conv/2", (6, 4, 3), [(2, 3, 12)]),
    ("matrix.T", (4, 6), [(6, 4)]),
    ("conv.T", (4, 6, 3), [(6, 12)]),
    ("batch.T", (5, 4, 6), [(5, 6, 4)]),
    ("matrix.T/3", (4, 6), [(3, 2, 4)]),
    ("matrix/3+2+1", (6, 4), [(3, 4), (2, 4), (1, 4)]),
    ("batch.T/4+2", (5, 4, 6), [(5, 4, 4), (5, 2, 4)]),
    ("matrix/2 interleaved", (6, 4), [(2, 3, 4)]),
    ("batch.T/2 interleaved", (5, 4, 6), [(5, 2, 3, 4)]),
    ("matrix/3 interleaved by 2", (12, 4), [(3, 4, 4)]),
    ("conv.T/2 interleaved", (4, 6, 3), [(2, 3, 12)]),
]


@pytest.mark.parametrize(("text", "shape", "shapes"), SPLITS)
def test_a_layout_reads_back_and_splits_and_joins(text, shape, shapes):
    layout = MatrixLayout.parse(text)
    assert str(layout) == text
    tensor = made(*shape)
    parts = layout.split(tensor)
    assert [tuple(p.shape) for p in parts] == layout.shapes(shape) == shapes
    assert torch.equal(layout.join(parts, shape), tensor)
    assert layout.join(parts, shape).is_contiguous()


@pytest.mark.parametrize(
    "text", ["matrix.T", "batch.T", "matrix.T/3", "matrix/2 interleaved", "batch.T/2 interleaved"]
)
def test_parts_are_views(text):
    layout = MatrixLayout.parse(text)
    tensor = made(2, 4, 6) if layout.kind == "batch" else made(6, 6)
    for part in layout.split(tensor):
        part.zero_()
    assert torch.equal(tensor, torch.zeros_like(tensor))


def test_rows_that_take_turns_are_distinguished():
    rows = torch.arange(12.0)[:, None].expand(12, 2)
    (by_rows,) = MatrixLayout.parse("matrix/2 interleaved").split(rows)
    assert by_rows[0, :, 0].tolist() == [0, 2, 4, 6, 8, 10]
    (by_heads,) = MatrixLayout.parse("matrix/3 interleaved by 2").split(rows)
    assert by_heads[1, :, 0].tolist() == [2, 3, 8, 9]


@given(
    st.sampled_from(["matrix", "conv", "batch"]),
    st.booleans(),
    st.one_of(st.integers(1, 9), st.lists(st.integers(1, 99), min_size=2, max_size=4).map(tuple)),
    st.integers(0, 64),
)
def test_texts_round_trip(kind, transposed, parts, interleaved):
    if isinstance(parts, tuple):
        interleaved = 0
    layout = MatrixLayout(kind=kind, transposed=transposed, parts=parts, interleaved=interleaved)
    assert MatrixLayout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    "text", ["", "cube", "matrix/", "matrix/0", "matrixT", "matrix/2+", "conv/2 interlaced"]
)
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="layout"):
        MatrixLayout.parse(text)


SVD = stages.Polar(method="svd")
STAGES = [
    SVD,
    stages.Polar(),
    stages.Scale(kind="rms"),
    stages.Scale(kind="spectral"),
    stages.Scale(kind="small"),
    stages.RowNormalize(beta2=0.9),
    stages.KeepNorm(stage=SVD),
    stages.LargeOnly(stage=SVD, at_least=5),
    stages.WeightPolar(period=2, polar=SVD),
    stages.PowerSGD(rank=2),
    stages.Dion(fraction=0.5),
    stages.chain(SVD, stages.RowNormalize(), stages.Scale(kind="spectral")),
]
# How a parameter is stored, and the layout that takes it apart again.
STORED = {
    "matrix.T": (lambda parts: torch.cat(parts).mT.contiguous(), [(12, 8)]),
    "matrix.T/3": (lambda parts: torch.cat(parts).mT.contiguous(), [(12, 8)] * 3),
    "matrix/12+4+4": (torch.cat, [(12, 8), (4, 8), (4, 8)]),
    "matrix.T/12+4+4": (lambda parts: torch.cat(parts).mT.contiguous(), [(12, 8), (4, 8), (4, 8)]),
    "matrix/2 interleaved": (lambda parts: torch.stack(parts, dim=1).flatten(0, 1), [(12, 8)] * 2),
    "matrix/2 interleaved by 3": (
        lambda parts: torch.cat([rows for i in range(0, 12, 3) for rows in (p[i : i + 3] for p in parts)]),
        [(12, 8)] * 2,
    ),
    "batch.T/2 interleaved": (
        lambda parts: torch.stack(parts, dim=2).flatten(1, 2).mT.contiguous(),
        [(3, 12, 8)] * 2,
    ),
    "conv.T": (lambda parts: parts[0].reshape(12, 4, 2).transpose(0, 1).contiguous(), [(12, 8)]),
}


# The low-rank stages start equal parts, which are one batch, from different random subspaces, and apart from the same.
PAIRS = [
    (stage, text)
    for stage in STAGES
    for text, (_, shapes) in STORED.items()
    if not (isinstance(stage, stages.PowerSGD | stages.Dion) and len(shapes) > 1 and len(set(shapes)) == 1)
]


@pytest.mark.parametrize(("stage", "text"), PAIRS, ids=str)
def test_every_stage_treats_parts_as_it_would_treat_them_apart(stage, text):
    """The same as the parts as parameters of their own, over some steps.

    A batch and its members, and memory in another order, sum in another order: rounding apart, which Newton-Schulz in the
    processor's own dtype (16 bits where it multiplies those faster) and the Householder reflections of the low-rank stages amplify.
    """
    store, shapes = STORED[text]
    apart = [made(*shape, seed=i) for i, shape in enumerate(shapes)]
    whole = [store(apart)]
    kinds = ["batch" if len(shape) == 3 else "matrix" for shape in shapes]
    layouts = ([MatrixLayout.parse(text)], [MatrixLayout.parse(kind) for kind in kinds])
    states = ([stage.init(p) for p in whole], [stage.init(p) for p in apart])
    for step in range(1, 4):
        updates = [made(*shape, seed=10 * step + i) for i, shape in enumerate(shapes)]
        context = [stages.Context(lr=0.1, step=step, transport=SingleReplica(), layouts=ls) for ls in layouts]
        (together,) = stage.apply([store(updates)], whole, states[0], context[0])
        separate = stage.apply(updates, apart, states[1], context[1])
        assert together.shape == whole[0].shape
        bound = 0.05 if stage == stages.Polar() else 2e-4
        assert torch.allclose(together, store(separate), rtol=bound, atol=bound)
        states = copy.deepcopy(states)
    assert stage.estimate_bytes(whole, layouts[0], replicas=2) == stage.estimate_bytes(
        apart, layouts[1], replicas=2
    )


def test_rows_of_unequal_parts_are_one_state():
    layout = MatrixLayout.parse("matrix/6+2")
    stage, param = stages.RowNormalize(), made(8, 4)
    state = stage.init(param)
    stage.apply(
        [param], [param], [state], stages.Context(lr=1.0, step=1, transport=SingleReplica(), layouts=[layout])
    )
    assert set(state) == {"step", "row_squares"}
    assert state["row_squares"].shape == (8, 1)


class Fused(nn.Module):
    """One layer, as nn.Linear or as GPT-2's Conv1D, with the weights of ``parts``."""

    def __init__(self, *parts, transposed=False):
        super().__init__()
        whole = torch.cat(parts)
        if transposed:
            self.fused = Conv1D(*whole.shape)
            self.fused.bias.requires_grad_(False)
        else:
            self.fused = nn.Linear(whole.shape[1], whole.shape[0], bias=False)
        with torch.no_grad():
            self.fused.weight.copy_(whole.T if transposed else whole)


def moved(model, gradients, recipe, **options):
    """The weights after a step for each list of gradients."""
    optimizer = recipes.build(recipe, model, lr=0.1, dtype="float32", **options)
    for step in gradients:
        for p, gradient in zip((p for p in model.parameters() if p.requires_grad), step, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("muon", {"scale": "rms"}),
        ("muon", {"scale": "spectral"}),
        ("muon", {"split": {"fused": 3}}),
        ("muon", {"split": {"fused": (32, 8, 8)}}),
        ("normuon", {}),
        ("normuon", {"split": {"fused": (32, 8, 8)}}),
    ],
)
def test_conv1d_steps_as_linear_does(recipe, options):
    """Norms sum in the order of the memory, which is the other one; five iterations and three steps carry that rounding on."""
    weight = made(48, 16)
    gradients = [made(48, 16, seed=s) for s in range(1, 4)]
    (linear,) = moved(Fused(weight), [[g] for g in gradients], recipe, **options)
    (conv1d,) = moved(Fused(weight, transposed=True), [[g.T] for g in gradients], recipe, **options)
    assert torch.allclose(conv1d.T, linear, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [{}, {"split": {"fused": 3}}, {"split": {"fused": (32, 8, 8)}}])
def test_conv1d_steps_as_linear_does_with_dion(split):
    """Products with a matrix stored the other way round are summed in another order, and three steps carry that on."""
    weight = made(48, 16)
    gradients = [made(48, 16, seed=s) for s in range(1, 4)]

    def after(model, turn):
        optimizer = recipes.build("dion", model, lr=0.1, fraction=0.5, **split)
        for gradient in gradients:
            model.fused.weight.grad = turn(gradient).clone()
            optimizer.step()
        return model.fused.weight.detach()

    linear = after(Fused(weight), lambda g: g)
    conv1d = after(Fused(weight, transposed=True), lambda g: g.T)
    assert torch.allclose(conv1d.T, linear, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["muon", "normuon"])
@pytest.mark.parametrize("scale", ["rms", "spectral"])
def test_grouped_query_attention_fused_steps_as_three_layers_do(recipe, scale):
    sizes = (64, 16, 16)
    parts = [made(size, 32, seed=i) for i, size in enumerate(sizes)]
    gradients = [[made(size, 32, seed=10 * s + i) for i, size in enumerate(sizes)] for s in range(1, 4)]
    three = nn.ModuleList([Fused(part) for part in parts])
    apart = moved(three, gradients, recipe, scale=scale)
    (fused,) = moved(
        Fused(*parts), [[torch.cat(g)] for g in gradients], recipe, scale=scale, split={"fused": sizes}
    )
    # NorMuon's means and norms sum in another order: a tall factor is stored transposed, the joined one is not.
    assert torch.equal(fused, torch.cat(apart)) or recipe == "normuon"
    assert torch.allclose(fused, torch.cat(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", ["muon", "normuon"])
def test_gate_and_up_that_take_turns_step_as_two_layers_do(recipe):
    """The pair's rows are not contiguous, those of the two layers are: norms sum in another order."""
    parts = [made(24, 16, seed=i) for i in range(2)]
    gradients = [[made(24, 16, seed=10 * s + i) for i in range(2)] for s in range(1, 4)]

    def interleave(pair):
        return torch.stack(list(pair), dim=1).flatten(0, 1)

    apart = moved(nn.ModuleList([Fused(part) for part in parts]), gradients, recipe)
    (fused,) = moved(
        Fused(interleave(parts)),
        [[interleave(g)] for g in gradients],
        recipe,
        split={"fused": "2 interleaved"},
    )
    assert torch.allclose(fused, interleave(apart), rtol=1e-5, atol=1e-6)


def test_parts_can_be_written_on_the_command_line():
    text = """muon(split={'fused': '2 interleaved', 'qkv': (16, 4, 4)})"""
    name, options = recipes.parse_recipe(text)
    assert recipes.format_recipe(name, options) == text
    model = nn.ModuleDict({"fused": nn.Linear(8, 24, bias=False), "qkv": nn.Linear(8, 24, bias=False)})
    (group,) = recipes.build(name, model, lr=0.1, **options).param_groups
    assert group["layouts"] == ["matrix/2 interleaved", "matrix/16+4+4"]
