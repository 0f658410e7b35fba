"""The contract matrix of stages, and what each computes."""

import copy

import pytest
import torch

from muonwire import stages
from muonwire.codec import parse
from muonwire.errors import PayloadError, UsageError
from muonwire.stages.rounds import Reply, join, perform, split
from muonwire.transport import SingleReplica

STAGES = [
    stages.Mean(),
    stages.Momentum(beta=0.9, nesterov=True),
    stages.Momentum(beta=0.9, nesterov=False, form="heavy_ball"),
    stages.Polar(),
    stages.Polar(method="svd"),
    stages.Scale(kind="rms"),
    stages.Scale(kind="spectral"),
    stages.Sign(),
    stages.Scale(kind="small"),
    stages.Adam(),
    stages.Anderson(),
    stages.ByRate(power=-1),
    stages.LargeOnly(stage=stages.Polar(), at_least=6),
    stages.KeepNorm(stage=stages.Polar()),
    stages.Exchange(codec=parse("float32")),
    stages.Exchange(codec=parse("topk(density=0.3) | sign(scale=tensor)"), feedback=stages.EF14(decay=0.9)),
    stages.Exchange(
        codec=parse("dct(chunk=4) | topk(k=2) | sign(scale=none)"),
        feedback=stages.ResidualMomentum(subtract="selected"),
        over="senders",
    ),
    stages.Exchange(codec=parse("topk(density=0.3) | int(bits=4)"), feedback=stages.EF21()),
    stages.Exchange(codec=parse("sign(scale=shared)"), feedback=stages.EF14(decay=0.9)),
    stages.Exchange(codec=parse("sign(scale=shared)"), feedback=stages.EF14(), means="lossless"),
    stages.Exchange(
        codec=parse("topk(density=0.3) | sign(scale=row)"),
        feedback=stages.EF14(decay=0.9),
        means="recompressed",
        mean_codec=parse("int(bits=4)"),
    ),
    stages.chain(stages.Momentum(), stages.Polar(), stages.Scale()),
]
SHAPES = [(6, 9), (9, 6), (5, 5), (1, 7), (7, 1), (1, 1), (0, 3)]


def context(count, lr=0.1, step=1):
    return stages.Context(
        lr=lr, step=step, transport=SingleReplica(), layouts=[stages.MatrixLayout()] * count
    )


def updates(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_stage_keeps_shapes_dtypes_and_its_inputs(stage, dtype):
    params = updates(dtype, seed=1)
    given = updates(dtype)
    before = copy.deepcopy(given)
    states = [stage.init(p) for p in params]
    results = stage.apply(given, params, states, context(len(params)))
    assert [r.shape for r in results] == [p.shape for p in params]
    assert all(r.dtype == dtype and r.isfinite().all() for r in results)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_every_stage_is_deterministic_and_all_it_remembers_is_its_state(stage):
    params = updates(seed=1)
    states = [stage.init(p) for p in params]
    for step in range(1, 4):
        stage.apply(updates(seed=step), params, states, context(len(params), step=step))
    copied = copy.deepcopy(states)
    first = stage.apply(updates(seed=9), params, states, context(len(params), step=4))
    second = stage.apply(updates(seed=9), params, copied, context(len(params), step=4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Signs without a scale have no zero: ±1 is what Psyche's DisTrO decodes.
@pytest.mark.parametrize("stage", [s for s in STAGES if "scale=none" not in str(s)], ids=str)
def test_every_stage_turns_zeros_into_zeros(stage):
    params = [torch.zeros(s) for s in SHAPES]
    results = stage.apply(params, params, [stage.init(p) for p in params], context(len(params)))
    assert all(torch.equal(r, torch.zeros_like(r)) for r in results)


def test_chains_compose_associatively_and_name_their_members():
    a, b, c = stages.Momentum(), stages.Sign(), stages.Scale()
    left = stages.chain(stages.chain(a, b), c)
    right = stages.chain(a, stages.chain(b, c))
    assert str(left) == str(right) == str(stages.chain(a, b, c))
    assert [n for n, _ in left.members] == ["momentum", "sign", "scale"]
    twice = stages.chain(a, b, a)
    assert [n for n, _ in twice.members] == ["momentum", "sign", "momentum_2"]
    params = updates(seed=1)
    outputs = [
        chain.apply(updates(), params, [chain.init(p) for p in params], context(len(params)))
        for chain in (left, right)
    ]
    assert all(torch.equal(x, y) for x, y in zip(*outputs, strict=True))


def test_names_given_twice_are_refused():
    with pytest.raises(UsageError, match="given twice"):
        stages.named_chain(("a", stages.Sign()), ("a", stages.Sign()))
    with pytest.raises(UsageError, match="holds a dot"):
        stages.named_chain(("a.b", stages.Sign()))


def test_momentum_in_both_forms_differs_by_a_factor():
    param = [torch.zeros(3)]
    forms = {}
    for form in ("ema", "heavy_ball"):
        stage = stages.Momentum(beta=0.75, nesterov=True, form=form)
        states = [stage.init(param[0])]
        for step in range(4):
            (forms[form],) = stage.apply([torch.tensor([1.0, -2.0, step])], param, states, context(1))
    assert torch.allclose(forms["ema"], 0.25 * forms["heavy_ball"])
    # v = 0.75 v + u over u = 0, 1, 2, 3 gives 5.0625; Nesterov adds u to 0.75 of it.
    assert forms["heavy_ball"][2] == pytest.approx(3 + 0.75 * 5.0625)


def test_polar_sees_layouts():
    conv = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    fused = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    layouts = [stages.MatrixLayout(kind="conv"), stages.MatrixLayout(parts=3)]
    ctx = stages.Context(lr=1.0, step=1, transport=SingleReplica(), layouts=layouts)
    got_conv, got_fused = stages.Polar(method="svd").apply([conv, fused], [conv, fused], [{}, {}], ctx)
    flat = got_conv.reshape(8, 27)
    assert torch.allclose(flat @ flat.T, torch.eye(8), atol=1e-5)
    for part in got_fused.view(3, 4, 8):
        assert torch.allclose(part @ part.T, torch.eye(4), atol=1e-5)
    scaled = stages.Scale(kind="rms").apply([conv, fused], [conv, fused], [{}, {}], ctx)
    assert torch.allclose(scaled[0], conv * 0.2 * 27**0.5)
    assert torch.allclose(scaled[1], fused * 0.2 * 8**0.5)


def test_error_feedback_keeps_exactly_what_was_not_sent():
    stage = stages.Exchange(codec=parse("topk(density=0.2) | sign(scale=tensor)"), feedback=stages.EF14())
    param = torch.zeros(10, 12)
    states = [stage.init(param)]
    given, sent = torch.zeros_like(param), torch.zeros_like(param)
    for step in range(30):
        update = updates_like(param, step)
        given += update
        sent += stage.apply([update], [param], states, context(1))[0]
    assert torch.allclose(sent + states[0]["residual"], given, atol=1e-4)
    assert states[0]["residual"].norm() < 0.8 * given.norm() + 10


def updates_like(param, seed):
    return torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("subtract", ["decoded", "selected"])
def test_residual_momentum_is_demos_formula(subtract):
    """One step written out: δ ← decay δ + lr g, minus what was sent, as the paper has it and as Psyche does."""
    codec = parse("dct(chunk=4) | topk(k=3) | sign(scale=chunk)")
    stage = stages.Exchange(codec=codec, feedback=stages.ResidualMomentum(decay=0.9, subtract=subtract))
    param = torch.zeros(8, 8)
    states = [stage.init(param)]
    delta = torch.zeros(8, 8)
    for step in range(3):
        gradient = updates_like(param, step)
        (got,) = stage.apply([gradient], [param], states, context(1, lr=0.1))
        delta = 0.9 * delta + 0.1 * gradient
        chunks = delta.view(2, 4, 2, 4).transpose(1, 2)
        n, k = torch.arange(4), torch.arange(4).unsqueeze(1)
        basis = torch.cos(torch.pi * (2 * n + 1) * k / 8) * (2 / 4) ** 0.5
        basis[0] /= 2**0.5
        coefficients = (basis @ chunks @ basis.T).reshape(4, 16)
        top = coefficients.abs().topk(3).indices
        values = coefficients.gather(1, top)
        selected = torch.zeros(4, 16).scatter(1, top, values)
        scale = values.abs().mean(1, keepdim=True).bfloat16().float()
        decoded = torch.zeros(4, 16).scatter(1, top, values.sign() * scale)

        def inverse(c, basis=basis):
            return (basis.T @ c.view(2, 2, 4, 4) @ basis).transpose(1, 2).reshape(8, 8)

        assert torch.allclose(got, inverse(decoded), atol=1e-5)
        delta = delta - inverse(selected if subtract == "selected" else decoded)
        assert torch.allclose(states[0]["residual"], delta, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: stages.Momentum(beta=1.0),
        lambda: stages.Momentum(form="other"),
        lambda: stages.Polar(method="guess"),
        lambda: stages.Polar(schedule="guess"),
        lambda: stages.Polar(dtype="int8"),
        lambda: stages.Scale(kind="guess"),
        lambda: stages.Adam(beta1=1.5),
        lambda: stages.Anderson(history=0),
        lambda: stages.Anderson(cap=0.0),
        lambda: stages.ByRate(power=2),
        lambda: stages.LargeOnly(stage=stages.Sign(), at_least=0),
        lambda: stages.LargeOnly(stage=stages.Mean()),
        lambda: stages.KeepNorm(stage=stages.Mean()),
        lambda: stages.EF14(decay=1.1),
        lambda: stages.ResidualMomentum(decay=-0.1),
        lambda: stages.ResidualMomentum(subtract="all"),
        lambda: stages.Exchange(codec=parse("float32"), over="some"),
        lambda: stages.Exchange(codec=parse("float32"), means="some"),
        lambda: stages.MatrixLayout(kind="cube"),
        lambda: stages.MatrixLayout(parts=(2, 0)),
        lambda: stages.MatrixLayout(parts=(2, 2), interleaved=1),
        lambda: stages.MatrixLayout.parse("matrix/2+2 interleaved"),
        lambda: stages.MatrixLayout(parts=5).shapes((12, 3)),
        lambda: stages.MatrixLayout(parts=(8, 3)).shapes((12, 3)),
        lambda: stages.MatrixLayout(parts=2, interleaved=4).shapes((12, 3)),
        lambda: stages.MatrixLayout().shapes((3,)),
        lambda: stages.MatrixLayout().shapes((2, 3, 4)),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_a_payload_that_does_not_decode_names_the_replica_that_sent_it():
    stage = stages.Exchange(codec=parse("float32"))
    param = torch.zeros(2, 2)
    good = stage.send([param], [param], [{}], context(1)).payload
    with pytest.raises(PayloadError, match="from replica 1: payload"):
        stage.receive(Reply(payloads=[good, good[:-3]]), [param], [{}], context(1))
    with pytest.raises(PayloadError, match=r"shape \(2, 2\), \(3, 3\) is expected"):
        stage.receive(Reply(payloads=[good]), [torch.zeros(3, 3)], [{}], context(1))


def test_rounds_answer_each_request_with_its_own_part():
    transport = SingleReplica()
    requests = [
        stages.Request(payload=b"one"),
        stages.Request(tensors=[torch.ones(2), torch.zeros(1)]),
        stages.Request(payload=b""),
        stages.Request(tensors=[torch.full((3,), 5.0)]),
    ]
    replies = perform(requests, transport)
    assert [list(r.payloads) for r in replies] == [[b"one"], [], [b""], []]
    assert [len(r.tensors) for r in replies] == [0, 2, 0, 1]
    assert replies[3].tensors[0][0] == 5


@pytest.mark.parametrize("message", [b"", b"\x01\x00", join([b"a", b"b"])[:-1], join([b"a", b"b"]) + b"c"])
def test_messages_that_do_not_add_up_are_payload_errors(message):
    with pytest.raises(PayloadError, match="message"):
        split(message, 2)
