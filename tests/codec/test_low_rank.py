"""Laws of the low-rank transform: exactness, optimality, the state that warms it, and the same product everywhere."""

import io
import math

import numpy as np
import pytest
import torch

from muonwire import codec, stages
from muonwire.codec.part import Round
from muonwire.optim import ChainOptimizer
from tests.codec.test_codecs import made

EPS = torch.finfo(torch.float32).eps
METHODS = ["power", "rsvd", "svd"]


def with_spectrum(m, n, values, seed=0):
    """A float32 matrix of the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    r = len(values)
    left = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
    return (left * torch.tensor(values, dtype=torch.float64) @ right.mT).float()


def decoded(transform, x, now=None):
    shape = tuple(x.shape)
    return transform.inverse(transform.forward(x, now or Round()), shape, seed=0)


def rounding(m, n, r):
    """Bound on ‖decoded − P Pᵀ X‖ / ‖X‖ in float32: products over m, n and r terms, each off by eps / 2 a term at most.

    x @ q and xᵀ @ p sum n and m products; QR and SVD are backward stable with a small multiple of (m + n) eps, for which the
    factor 4 stands.
    """
    return 4 * (m + n + r) * EPS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 30), (17, 61), (5, 4, 16), (100, 13)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_the_rank_or_less_is_exact(method, shape, rank):
    m, n = shape[0], math.prod(shape[1:])
    x = with_spectrum(m, n, [3.0, 2.0, 1.0][:rank]).view(shape)
    transform = codec.LowRank(rank=3, method=method)
    assert transform.grid(shape) == (3, m + n)
    # A start that is nearly orthogonal to X's rows magnifies the rounding of X Q by the condition of Vᵀ Q.
    start = codec.LowRank(rank=3).init(shape)["q"]
    rows = torch.linalg.svd(x.view(m, n), full_matrices=False).Vh[:rank]
    condition = 3 / torch.linalg.svdvals(rows @ start).min().item() if method == "power" else 1
    assert (decoded(transform, x) - x).norm() <= condition * rounding(m, n, 3) * x.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-30, 0, 30])
def test_the_error_is_never_below_that_of_the_truncated_svd(method, exponent):
    x = made((48, 70)) * 10.0**exponent
    least = torch.linalg.svdvals(x.double())[5:].norm().item()
    error = (decoded(codec.LowRank(rank=5, method=method), x).double() - x).norm().item()
    slack = rounding(48, 70, 5) * x.double().norm().item()
    assert error >= least - slack
    if method == "svd":
        assert error <= least + slack


def test_a_randomized_svd_is_within_halkos_bound_and_iterations_improve_it():
    """Theorem 10.5 (Frobenius): √(1 + r / (p − 1)) times the tail's norm for the basis, p = 8; truncating it adds the tail."""
    values = [1 / math.sqrt(i) for i in range(1, 61)]
    x = with_spectrum(80, 60, values)
    tail = math.sqrt(sum(v * v for v in values[6:]))
    errors = [
        (decoded(codec.LowRank(rank=6, method="rsvd", iterations=i), x) - x).norm().item() for i in (0, 1, 4)
    ]
    assert errors[0] <= (math.sqrt(1 + 6 / 7) + 1) * tail
    assert errors[0] > errors[1] > errors[2] >= tail * (1 - rounding(80, 60, 6))
    # After q iterations the tail counts (σ_{r+p} / σ_r)^(2 q) times as much in the basis (corollary 10.10): little at q = 4.
    assert errors[2] <= 1.01 * tail


def test_a_warm_start_converges_to_the_truncated_svd():
    """With θ the largest angle to the leading singular vectors, each product with X or Xᵀ multiplies tan θ by σ_{r+1} / σ_r.

    The excess of the squared error over the truncated SVD's is at most sin² θ ‖X‖².
    """
    rank, ratio = 3, 0.8
    values = [4.0, 3.0, 2.0] + [2.0 * ratio * 0.97**i for i in range(20)]
    x = with_spectrum(40, 50, values)
    transform = codec.LowRank(rank=rank)
    state = transform.init((40, 50))
    right = torch.linalg.svd(x.double()).Vh
    inside, outside = right[:rank] @ state["q"].double(), right[rank:] @ state["q"].double()
    tangent = torch.linalg.matrix_norm(outside @ torch.linalg.inv(inside), 2).item()
    least = sum(v * v for v in values[rank:])
    slack = 2 * rounding(40, 50, rank) * x.square().sum().item()
    cold = (decoded(transform, x) - x).double().square().sum().item()
    squares = []
    for step in range(1, 30):
        squares.append((decoded(transform, x, Round(state=state)) - x).double().square().sum().item())
        bound = x.square().sum().item() * (tangent * ratio ** (2 * step - 1)) ** 2
        assert -slack <= squares[-1] - least <= bound + slack
    assert squares[0] == cold
    # The bound is a share tan² θ of ‖X‖², under a millionth by now: it tells convergence from a stay.
    assert (tangent * ratio**57) ** 2 < 1e-6
    assert squares[-1] - least < 1e-4 * (cold - least)


def test_more_iterations_are_as_many_rounds():
    """Up to the rounding, and the scaling of Q's columns, which spans the same."""
    x = with_spectrum(30, 40, [3.0, 2.0, 1.0, 0.5, 0.2])
    state = codec.LowRank(rank=2).init((30, 40))
    for _ in range(3):
        rounds = decoded(codec.LowRank(rank=2), x, Round(state=state))
    together = decoded(codec.LowRank(rank=2, iterations=3), x)
    # The second singular value is twice the third: rounding of the subspace grows by at most σ₁ / (σ₂ − σ₃) = 3 a product.
    assert (rounds - together).norm() <= 3 * 6 * rounding(30, 40, 2) * x.norm()


def test_the_state_is_the_same_on_all_replicas_and_survives_zeros_and_low_ranks():
    transform = codec.LowRank(rank=4)
    first, second = transform.init((30, 20)), transform.init((30, 20))
    assert torch.equal(first["q"], second["q"])
    assert first["q"].shape == (20, 4)
    start = first["q"].clone()
    held = first["q"]
    assert torch.equal(decoded(transform, torch.zeros(30, 20), Round(state=first)), torch.zeros(30, 20))
    assert torch.equal(first["q"], start)
    # One entry: three of the four columns find nothing (P's other columns are orthogonal to it) and stay as they are.
    single = torch.zeros(30, 20)
    single[3, 5] = -2.0
    assert torch.allclose(
        decoded(transform, single, Round(state=first)), single, atol=2 * rounding(30, 20, 4)
    )
    assert first["q"] is held
    assert torch.allclose(first["q"].norm(dim=0), torch.ones(4), atol=20 * EPS)
    x = made((30, 20))
    decoded(transform, x, Round(state=first))
    assert torch.linalg.svdvals(first["q"])[-1] > 1e-3


@pytest.mark.parametrize("method", ["rsvd", "svd"])
def test_only_the_power_iteration_keeps_state(method):
    assert codec.LowRank(method=method).init((30, 20)) == {}
    assert codec.LowRank().init((30,)) == codec.LowRank().init((3, 4)) == {}


@pytest.mark.parametrize("shape", [(9,), (), (1, 50), (50, 1), (4, 4), (0, 3), (6, 7)])
def test_what_factors_would_not_shorten_goes_as_it_is(shape):
    x = made(shape)
    low, plain = codec.parse("lowrank(rank=4) | float32"), codec.parse("float32")
    assert low.encode_body(x).body == plain.encode_body(x).body
    assert torch.equal(low.encode_body(x).decoded, x)


def test_a_rank_over_the_matrix_is_cut():
    assert codec.LowRank(rank=50).grid((100, 3)) == (100, 3)
    assert codec.LowRank(rank=2).grid((100, 3)) == (2, 103)
    assert codec.LowRank(rank=50).grid((300, 200)) == (50, 500)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e20])
def test_both_halves_of_a_block_have_the_same_root_mean_square(method, magnitude):
    blocks = codec.LowRank(rank=3, method=method).forward(made((90, 25)) * magnitude, Round()).double()
    left, right = blocks[:, :90].square().mean(1).sqrt(), blocks[:, 90:].square().mean(1).sqrt()
    # Norms of float32 columns: one rounding a term at most, and a handful for roots and quotients.
    assert (left / right).numpy() == pytest.approx(np.ones(3), rel=(90 + 25 + 10) * EPS)


@pytest.mark.parametrize("shape", [(300, 500), (7, 40, 3)])
def test_the_product_is_one_rounded_operation_after_the_other(shape):
    """Bit for bit what float32 arithmetic gives in numpy, in the order of the columns, so that machines agree."""
    transform = codec.LowRank(rank=5)
    blocks = made(transform.grid(shape))
    expected = np.zeros((shape[0], math.prod(shape[1:])), dtype=np.float32)
    for column in blocks.numpy():
        expected = expected + column[: shape[0], None] * column[None, shape[0] :]
    assert np.array_equal(transform.inverse(blocks, shape, seed=0).numpy(), expected.reshape(shape))


def test_replicas_are_averaged_after_decoding():
    chosen = codec.parse("lowrank(rank=2) | bfloat16")
    encoded = [chosen.encode_body(made((20, 30), seed=s)) for s in range(3)]
    mean = chosen.mean_bodies([e.body for e in encoded], (20, 30))
    assert torch.equal(mean, (encoded[0].decoded + encoded[1].decoded + encoded[2].decoded) / 3)
    assert torch.linalg.matrix_rank(mean) == 6


def test_the_factors_take_any_selection_and_quantizer():
    x = with_spectrum(64, 96, [8.0, 4.0, 2.0])
    for text, num_bytes in {
        "lowrank(rank=3) | bfloat16": 3 * 160 * 2,
        "lowrank(rank=3) | sign(scale=chunk)": 3 * 2 + 3 * 160 // 8,
        "lowrank(rank=3) | toprows(k=2) | float32": 2 + 2 * 160 * 4,
    }.items():
        encoded = codec.parse(text).encode_body(x)
        assert abs(len(encoded.body) - num_bytes) <= 2
        assert ((x - encoded.decoded) * encoded.decoded).isfinite().all()
    # bfloat16 rounds p and q each by 2⁻⁹ of itself at most: 2⁻⁸ of every term, in norm.
    terms = 8.0 + 4.0 + 2.0
    error = (codec.parse("lowrank(rank=3) | bfloat16").encode_body(x).decoded - x).norm()
    assert error <= 1.01 * 2**-8 * terms + rounding(64, 96, 3) * x.norm()


def optimizer_of(weights):
    stage = stages.Exchange(codec=codec.parse("lowrank(rank=2) | bfloat16"), feedback=stages.EF14())
    return ChainOptimizer(weights, chain=stage, lr=0.1)


def train(optimizer, weights, rounds):
    for step in rounds:
        for i, weight in enumerate(weights):
            weight.grad = made(tuple(weight.shape), weight.dtype, seed=10 * step + i)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit_and_a_lost_one_does_not(dtype):
    weights = [torch.nn.Parameter(made(s, dtype)) for s in [(20, 30), (12,), (40, 9)]]
    optimizer = optimizer_of(weights)
    train(optimizer, weights, range(5))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    continued = []
    for lost in (False, True):
        file.seek(0)
        copies = [torch.nn.Parameter(w.detach().clone()) for w in weights]
        again = optimizer_of(copies)
        saved = torch.load(file)
        states = [s for s in saved["state"].values() if any("codec" in str(k) for k in flat(s))]
        assert len(states) == 2
        if lost:
            for state in states:
                forget(state)
        again.load_state_dict(saved)
        train(again, copies, range(5, 9))
        continued.append(copies)
    train(optimizer, weights, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(weights, continued[0], strict=True))
    assert not torch.equal(weights[0], continued[1][0])


def flat(state):
    for key, value in state.items():
        yield key
        if isinstance(value, dict):
            yield from flat(value)


def forget(state):
    for value in state.values():
        if isinstance(value, dict):
            if "q" in value:
                value["q"].copy_(torch.eye(*value["q"].shape))
            forget(value)
