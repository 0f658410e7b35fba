"""Laws of feedback, and what is never let through to the weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import stages
from muonwire.codec import parse
from muonwire.codec import payload as payloads
from muonwire.errors import PayloadError, UsageError
from muonwire.optim import ChainOptimizer
from muonwire.stages.rounds import Reply
from muonwire.transport import ProcessGroupTransport, SingleReplica, check_replicas
from tests.lockstep import lockstep
from tests.replicas import run_replicas

CODECS = [
    "float32",
    "bfloat16",
    "sign(scale=row)",
    "int(bits=2)",
    "int(bits=4, rounding=stochastic)",
    "codebook(bits=2)",
    "ternary",
    "topk(density=0.3) | float32",
    "topk(density=0.3) | sign(scale=tensor)",
    "topk(density=0.3) | int(bits=4, scale=row)",
    "dct(chunk=8) | topk(k=4) | sign(scale=chunk)",
    "dct(chunk=8) | topk(k=4) | codebook(bits=4, scale=chunk)",
]
FEEDBACK = [
    stages.EF14(),
    stages.EF14(decay=0.9),
    stages.EF21(),
    stages.ResidualMomentum(),
    stages.ResidualMomentum(decay=0.9, factor=0.5),
    stages.ResidualMomentum(subtract="selected"),
]
LR = 0.1


def context(count=1, names=(), step=1):
    layouts = [stages.MatrixLayout()] * count
    return stages.Context(lr=LR, step=step, transport=SingleReplica(), layouts=layouts, names=names)


def made(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=150, deadline=None)
@given(
    text=st.sampled_from(CODECS),
    feedback=st.sampled_from(FEEDBACK),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    shape=st.tuples(st.integers(1, 16), st.integers(1, 24)),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_sent_and_kept_are_the_signal_to_the_last_bit(text, feedback, dtype, shape, exponent, seed):
    """Kept + factor · sent = signal, up to the rounding of the one subtraction in what is kept (EF21 keeps the other part)."""
    codec = parse(text)
    param = torch.zeros(shape, dtype=dtype)
    state = feedback.init(param)
    factor = getattr(feedback, "factor", 1.0)
    for step in range(3):
        update = (made(shape, seed + step).double() * 10.0**exponent).to(dtype)
        estimate = state["estimate"].double().clone() if "estimate" in state else None
        signal = feedback.signal(update, state, context(step=step)).clone()
        encoded = codec.encode_body(signal, seed=seed)
        feedback.keep(encoded, state)
        sent = (
            encoded.selected if getattr(feedback, "subtract", "") == "selected" else encoded.decoded
        ).double()
        kept = state["residual" if estimate is None else "estimate"]
        if estimate is None:
            exact = signal.double() - factor * sent
        else:
            exact = estimate + sent
            # The estimate and the signal are the update, up to the signal's own rounding and this sum's.
            error = (estimate + signal.double() - update.double()).abs()
            assert (error <= torch.finfo(signal.dtype).eps * (signal.double().abs() + estimate.abs())).all()
        # The difference is rounded to the state's dtype once, having been formed in float32 at least.
        unit = torch.finfo(kept.dtype).eps / 2
        wide = torch.finfo(torch.promote_types(kept.dtype, torch.float32)).eps / 2
        tolerance = unit * exact.abs() + wide * (exact.abs() + 2 * (factor * sent).abs()) + 2.0**-133
        assert ((kept.double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize(
    "text", ["int(bits=2)", "sign(scale=row)", "ternary", "codebook(bits=2)", "bfloat16"]
)
@pytest.mark.parametrize(
    "feedback",
    [stages.EF14(), stages.ResidualMomentum(decay=1.0), stages.ResidualMomentum(subtract="selected")],
)
def test_what_is_kept_holds_the_quantizers_error(text, feedback):
    """Nothing is dropped by a selection here, so what is kept is the quantizer's error alone."""
    stage = stages.Exchange(codec=parse(text), feedback=feedback)
    param, update = torch.zeros(6, 9), made((6, 9), 0)
    states = [stage.init(param)]
    (decoded,) = stage.apply([update], [param], states, context())
    signal = update if isinstance(feedback, stages.EF14) else LR * update
    if getattr(feedback, "subtract", "") == "selected":
        assert torch.equal(states[0]["residual"], torch.zeros(6, 9))
    else:
        assert torch.equal(states[0]["residual"], signal - decoded)
        assert states[0]["residual"].abs().max() > 0


@pytest.mark.parametrize(
    "text", ["topk(density=0.1) | int(bits=2)", "dct(chunk=4) | topk(k=2) | ternary(scale=chunk)"]
)
def test_without_decay_all_that_was_sent_and_what_is_kept_is_all_that_was_given(text):
    stage = stages.Exchange(codec=parse(text), feedback=stages.EF14())
    param = torch.zeros(8, 12, dtype=torch.float64)
    states = [stage.init(param)]
    given, sent, largest = torch.zeros_like(param), torch.zeros_like(param), 0.0
    steps = 40
    for step in range(1, steps + 1):
        update = made((8, 12), step, torch.float64)
        given += update
        sent += stage.apply([update], [param], states, context(step=step))[0]
        largest = max(largest, float(sent.abs().max()), float(given.abs().max()))
    # What is sent is the same numbers that are subtracted; two float64 sums a step are rounded on either side.
    tolerance = 6 * steps * torch.finfo(torch.float64).eps * largest
    # The inverse transform of a mean is taken in float32, and so is that of what the sender subtracts: the same bits.
    assert (sent + states[0]["residual"] - given).abs().max() <= tolerance


def ef21(transport, text, steps, dtype):
    """Each step's update and estimate, and the mean estimate of the last, of one replica."""
    stage = stages.Exchange(codec=parse(text), feedback=stages.EF21())
    param = torch.zeros(7, 10, dtype=dtype)
    states = [stage.init(param)]
    history = []
    for step in range(1, steps + 1):
        update = made((7, 10), 100 * step + transport.rank, dtype)
        here = stages.Context(lr=1.0, step=step, transport=transport, layouts=[stages.MatrixLayout()])
        (got,) = stage.apply([update], [param], states, here)
        history.append((got.clone(), states[0]["estimate"].clone(), states[0]["mean_estimate"].clone()))
    return history


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    "text", ["topk(density=0.2) | sign(scale=tensor)", "int(bits=2, rounding=stochastic)"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ef21_is_its_algorithm(text, replicas, dtype):
    """gᵣ ← gᵣ + C(u − gᵣ) for each replica, written out, and the mean of all gᵣ."""
    steps = 8
    results = lockstep(lambda transport: ef21(transport, text, steps, dtype), replicas)
    estimates = [torch.zeros(7, 10) for _ in range(replicas)]
    largest = 0.0
    for step in range(1, steps + 1):
        for rank in range(replicas):
            signal = made((7, 10), 100 * step + rank, dtype) - estimates[rank]
            seed = stages.exchange.round_seed(step=step, index=0)
            decoded = parse(text).encode_body(signal, seed=seed).decoded
            estimates[rank] = estimates[rank] + decoded
            largest = max(largest, float(decoded.abs().max()), float(estimates[rank].abs().max()))
            assert torch.equal(results[rank][step - 1][1], estimates[rank])
        mean = torch.stack([e.double() for e in estimates]).mean(0)
        got, _, mean_estimate = results[0][step - 1]
        # A round of float32: each estimate is rounded once, the sum of R messages R times, the mean estimate twice.
        drift = step * (replicas + 3) * 2**-24 * replicas * largest
        assert (mean_estimate.double() - mean).abs().max() <= drift
        assert torch.equal(got, mean_estimate.to(dtype))
        for history in results:
            assert torch.equal(history[step - 1][2], mean_estimate)


def test_ef21_without_a_codecs_loss_is_the_mean():
    histories = lockstep(lambda transport: ef21(transport, "float32", 5, torch.float32), 2)
    for step in range(1, 6):
        mean = (made((7, 10), 100 * step) + made((7, 10), 100 * step + 1)) / 2
        # u − g, g + (u − g) and the mean's own sum are rounded in each of the steps; no value is over 5.
        assert (histories[0][step - 1][0] - mean).abs().max() <= 6 * step * 2**-24 * 5


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_ef21_comes_nearer_by_what_topk_contracts(density):
    """‖u − g‖² shrinks by at least 1 − k / n each round for a constant u (Richtárik et al., 2021, assumption 1)."""
    stage = stages.Exchange(codec=parse(f"topk(density={density}) | float32"), feedback=stages.EF21())
    param, update = torch.zeros(10, 10), made((10, 10), 0)
    states = [stage.init(param)]
    for step in range(1, 12):
        (got,) = stage.apply([update], [param], states, context(step=step))
        bound = (1 - density) ** step * float(update.square().sum())
        assert float((update - got).square().sum()) <= bound + 1e-12


def ef21_training(transport, resume):
    weight = torch.nn.Parameter(made((6, 8), 1))
    chain = stages.chain(
        stages.Momentum(),
        stages.Exchange(
            codec=parse("topk(density=0.2) | int(bits=4, rounding=stochastic)"), feedback=stages.EF21()
        ),
    )

    def optimizer_of(weight):
        return ChainOptimizer([weight], chain=chain, lr=0.1, transport=transport)

    optimizer = optimizer_of(weight)
    for step in range(6):
        if resume and step == 3:
            saved = optimizer.state_dict()
            weight = torch.nn.Parameter(weight.detach().clone())
            optimizer = optimizer_of(weight)
            optimizer.load_state_dict(saved)
        weight.grad = made((6, 8), 10 * step + transport.rank)
        optimizer.step()
    mean_estimate = optimizer.state[weight]["exchange"]["mean_estimate"]
    return weight.detach(), mean_estimate


def _ef21_in_a_process():
    transport = ProcessGroupTransport()
    weight, mean_estimate = ef21_training(transport, False)
    return check_replicas([("weight", weight), ("mean_estimate", mean_estimate)], transport)


def test_ef21_resumes_bit_for_bit_and_is_the_same_on_all_replicas():
    straight = lockstep(lambda transport: ef21_training(transport, False), 2)
    resumed = lockstep(lambda transport: ef21_training(transport, True), 2)
    for other in (straight[1], *resumed):
        assert all(torch.equal(a, b) for a, b in zip(straight[0], other, strict=True))
    assert len(set(run_replicas(_ef21_in_a_process, 2))) == 1


def test_residual_momentum_without_subtraction_is_momentum():
    stage = stages.Exchange(codec=parse("float32"), feedback=stages.ResidualMomentum(decay=0.5, factor=0.0))
    param = torch.zeros(3)
    states = [stage.init(param)]
    for step, wanted in enumerate((1.0, 1.5, 1.75), start=1):
        (got,) = stage.apply([torch.full((3,), 1 / LR)], [param], states, context(step=step))
        assert torch.allclose(got, torch.full((3,), wanted))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: stages.ResidualMomentum(factor=1.5), r"factor is 1.5; it must lie in \[0, 1\]"),
        (lambda: stages.ResidualMomentum(factor=math.nan), r"factor is nan"),
        (
            lambda: stages.Exchange(codec=parse("float32"), feedback=stages.EF21(), over="senders"),
            "EF21 needs the mean over all replicas",
        ),
    ],
)
def test_bad_options_say_what_is_allowed(make, says):
    with pytest.raises(UsageError, match=says):
        make()


def bodies_of(text, *tensors):
    return [parse(text).encode_body(t).body for t in tensors]


def float32_body(*values):
    return np.array(values, dtype="<f4").tobytes()


LARGEST = float(torch.finfo(torch.float32).max)
GOOD = float32_body(1, 2, 3, 4)
CASES = {
    "a nan": ("float32", torch.float32, [GOOD, float32_body(1, math.nan, 3, 4)], 1, "is not finite"),
    "an infinite scale": (
        "sign(scale=tensor)",
        torch.float32,
        [*bodies_of("sign(scale=tensor)", torch.ones(4)), b"\x80\x7f\x00", b"\x80\x3f\x00"],
        1,
        "a scale is not finite",
    ),
    "wrong length": ("float32", torch.float32, [GOOD, GOOD, GOOD[:-1]], 2, "take 16"),
    "too large for the parameter": (
        "float32",
        torch.float16,
        [GOOD, float32_body(0, 0, 2e5, 0)],
        1,
        "not finite in torch.float16",
    ),
    "too large after the inverse transform": (
        "dct(chunk=4) | float32",
        torch.float32,
        [float32_body(LARGEST, LARGEST, LARGEST, LARGEST)],
        0,
        "overflows",
    ),
    "finite numbers with an infinite sum": (
        "float32",
        torch.float32,
        [float32_body(0, 2e38, 0, 0), float32_body(0, 3e38, 0, 0)],
        1,
        r"up to 3e\+38, are the largest in a sum over the replicas that is not finite",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("feedback", [stages.NoFeedback(), stages.EF21()])
def test_what_is_not_finite_names_the_sender_and_the_tensor(case, named, feedback):
    text, dtype, bodies, sender, says = CASES[case]
    stage = stages.Exchange(codec=parse(text), feedback=feedback)
    # The culprit is the second of two tensors.
    params = [torch.zeros(4, dtype=dtype)] * 2
    fine = parse(text).encode_body(torch.ones(4)).body
    messages = [
        payloads.pack(text, [((4,), torch.float32, fine), ((4,), torch.float32, body)]) for body in bodies
    ]
    names = ("first.weight", "second.weight") if named else ()
    what = r"tensor 1 \(second.weight\)" if named else "tensor 1"
    with pytest.raises(PayloadError, match=rf"^from replica {sender}: {what} of shape \(4,\): .*{says}"):
        stage.receive(Reply(payloads=messages), params, [stage.init(p) for p in params], context(2, names))


def test_a_forged_payload_stops_all_replicas_before_weights_move():
    """Replica 1 sends an infinite value with a right checksum; both replicas name it and the parameter."""

    def forge(rank, payload):
        if rank == 0:
            return payload
        (entry,) = payloads.unpack(payload)
        body = entry.body[:-4] + float32_body(math.inf)
        return payloads.pack("float32", [(entry.shape, entry.dtype, body)])

    def run(transport):
        weight = torch.nn.Parameter(torch.ones(2, 3))
        group = {"params": [weight], "names": ["layers.3.weight"]}
        optimizer = ChainOptimizer(
            [group], chain=stages.Exchange(codec=parse("float32")), lr=0.1, transport=transport
        )
        weight.grad = made((2, 3), transport.rank)
        with pytest.raises(
            PayloadError, match=r"from replica 1: tensor 0 \(layers.3.weight\) of shape \(2, 3\)"
        ):
            optimizer.step()
        return torch.equal(weight.detach(), torch.ones(2, 3))

    assert lockstep(run, 2, forge) == [True, True]
