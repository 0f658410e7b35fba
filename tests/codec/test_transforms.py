"""Laws of the seeded transforms: rotations and projections."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import codec
from muonwire.codec import random
from muonwire.codec.part import Round
from tests.codec.test_codecs import made

EPS = torch.finfo(torch.float32).eps


def rotation_error(block_numel):
    """Largest relative error (2-norm) of one rotation in float32.

    Each level of butterflies rounds every entry once, by at most eps / 2 of it, and the scale does so once (its constant
    once more); a block that is no power of two is rotated twice. The factor 2 covers the higher orders.
    """
    levels = max(block_numel.bit_length() - 1, 0) + 2
    twice = 1 if block_numel & (block_numel - 1) == 0 else 2
    return 2 * twice * levels * EPS / 2


def as_matrix(transform, numel, seed=0):
    """The transform of one block as a matrix: forward of the basis vectors, in float64."""
    basis = torch.eye(numel, dtype=torch.float64)
    return torch.cat([transform.forward(e, Round(seed=seed)) for e in basis]).mT


def test_a_rotation_is_signs_and_then_sylvesters_matrix():
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < 64:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    x = made((5, 64))
    signs = random.signs(9, "hadamard", 5 * 64).view(5, 64)
    expected = (x * signs).double() @ sylvester / 8
    got = codec.Hadamard(block=64).forward(x, Round(seed=9))
    assert ((got - expected).norm(dim=1) <= rotation_error(64) * x.norm(dim=1)).all()


@pytest.mark.parametrize("numel", [1, 2, 7, 12, 13, 64, 100])
@pytest.mark.parametrize("block", [4, 128])
def test_a_rotation_of_any_size_is_orthonormal(numel, block):
    matrices = as_matrix(codec.Hadamard(block=block), numel) if numel <= block else None
    if matrices is None:
        x = made((numel,), torch.float64)
        blocks = codec.Hadamard(block=block).forward(x, Round())
        assert blocks.shape[1] == max(d for d in range(1, block + 1) if numel % d == 0)
        assert blocks.norm(dim=1).numpy() == pytest.approx(
            x.view(blocks.shape).norm(dim=1).numpy(), rel=1e-14
        )
    else:
        # Two float64 rotations of relative error well below 1e-14.
        assert (matrices @ matrices.mT - torch.eye(numel, dtype=torch.float64)).abs().max() < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    block=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_rotation_keeps_norms_and_inner_products_and_is_undone(rows, columns, block, seed):
    rotation = codec.Hadamard(block=block)
    x, y = made((rows, columns), seed=1), made((rows, columns), seed=2)
    bx, by = rotation.forward(x, Round(seed=seed)), rotation.forward(y, Round(seed=seed))
    assert bx.shape == rotation.grid((rows, columns))
    bound = rotation_error(bx.shape[1])
    # In float64, so that only the rotation's own rounding counts.
    assert bx.double().norm().item() == pytest.approx(x.double().norm().item(), rel=bound)
    product, expected = (bx.double() * by).sum(), (x.double() * y).sum()
    # |⟨x + dx, y + dy⟩ − ⟨x, y⟩| ≤ (2 bound + bound²) ‖x‖ ‖y‖.
    assert abs(product - expected) <= 2.01 * bound * x.norm() * y.norm()
    back = rotation.inverse(bx, (rows, columns), seed=seed)
    assert (back - x).norm() <= 2.01 * bound * x.norm()


@pytest.mark.parametrize("shape", [(64,), (3, 64), (100,), (700, 128)])
def test_the_inverse_is_one_rounded_operation_after_the_other(shape):
    """Bit for bit what float32 arithmetic gives in numpy, so that machines agree, whatever the number of threads."""
    rotation = codec.Hadamard(block=128)
    num_blocks, block_numel = rotation.grid(shape)
    y = made((num_blocks, block_numel))
    expected = y.numpy().copy()
    size = 1 << (block_numel.bit_length() - 1)
    for start in dict.fromkeys((block_numel - size, 0)):
        span = expected[:, start : start + size] * np.float32(1 / math.sqrt(size))
        half = 1
        while half < size:
            pairs = span.reshape(num_blocks, -1, 2, half)
            span = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2)
            span = span.reshape(num_blocks, size)
            half *= 2
        expected[:, start : start + size] = span
    expected *= random.signs(3, "hadamard", y.numel()).view(y.shape).numpy()
    assert np.array_equal(rotation.inverse(y, shape, seed=3).numpy(), expected.reshape(shape))


def test_a_rotation_spreads_an_outlier_and_saves_a_one_bit_code():
    """A spike decodes from signs and one scale exactly; without a rotation it is lost in the mean magnitude."""
    spike = torch.zeros(1024)
    spike[77] = 3.0
    rotated = codec.parse("hadamard(block=1024) | sign(scale=chunk)").encode_body(spike, seed=4).decoded
    plain = codec.parse("sign(scale=tensor)").encode_body(spike, seed=4).decoded
    # All coefficients are ±3/32, whose bfloat16 is exact.
    assert torch.equal(rotated, spike)
    assert (plain - spike).norm() > 0.9 * spike.norm()


def test_one_bit_after_a_rotation_costs_what_it_costs_a_gaussian():
    """‖x̂ − x‖² / ‖x‖² = 1 − (E|y|)² / E y², which is 1 − 2 / π for Gaussian y (DRIVE, theorem 1), whatever x was.

    For cubes of Gaussians it is 1 − (E|g|³)² / E g⁶ = 1 − (8 / π) / 15 without a rotation. Of 65536 values each mean is within a
    few times 1 / 256; the cubes' twelfth moment, 46 times the square of the sixth, makes theirs 7 times as wide.
    """
    x = made((64, 1024), torch.float64) ** 3
    codecs = {"hadamard(block=1024) | sign(scale=chunk)": 2 / math.pi, "sign(scale=tensor)": 8 / math.pi / 15}
    for (text, kept), tolerance in zip(codecs.items(), (5 / 256, 7 * 5 / 256), strict=True):
        decoded = codec.parse(text).encode_body(x, seed=1).decoded
        assert abs((decoded - x).square().sum() / x.square().sum() - (1 - kept)) < tolerance


def test_rounds_of_other_seeds_rotate_otherwise():
    x = made((16, 64))
    first, second = (codec.parse("hadamard | float32").encode_body(x, seed=s) for s in (1, 2))
    assert first.body[4:] != second.body[4:]
    assert codec.parse("hadamard | float32").encode_body(x, seed=1).body == first.body


@pytest.mark.parametrize(
    "text", ["hadamard(block=32) | topk(k=9) | float32", "projection(density=0.5) | float32"]
)
def test_replicas_of_one_round_are_averaged_in_the_transforms_domain(text):
    chosen = codec.parse(text)
    encoded = [chosen.encode_body(made((16, 24), seed=s), seed=7) for s in range(3)]
    mean = chosen.mean_bodies([e.body for e in encoded], (16, 24))
    expected = torch.stack([e.decoded.double() for e in encoded]).mean(0)
    # Four rotations and three roundings of the mean, at most, of norms below the inputs' 3 · 22.
    assert (mean - expected).norm() <= (4 * rotation_error(384) + 3 * EPS) * 3 * 22
    # Bodies of different rounds have no common domain and are decoded one by one.
    mixed = [encoded[0], chosen.encode_body(made((16, 24), seed=1), seed=8)]
    expected = (mixed[0].decoded + mixed[1].decoded) / 2
    assert torch.equal(chosen.mean_bodies([e.body for e in mixed], (16, 24)), expected)


def test_a_projection_of_density_one_is_the_rotation():
    x = made((12, 40))
    whole = codec.Projection(density=1.0, block=96).forward(x, Round(seed=5))
    assert torch.equal(whole, codec.Hadamard(block=96).forward(x, Round(seed=5)))


def test_a_projection_keeps_a_random_share_of_the_rotation():
    x = made((12, 40))
    rotated = codec.Hadamard(block=96).forward(x, Round(seed=5))
    kept = random.subsets(5, "projection", 1, 96, 24)
    got = codec.Projection(density=0.25, block=96).forward(x, Round(seed=5))
    assert torch.equal(got, rotated[:, kept])


@pytest.mark.parametrize("numel", [7, 13, 32, 48])
def test_a_projection_has_orthonormal_rows(numel):
    matrix = as_matrix(codec.Projection(density=0.4, block=64), numel, seed=2)
    assert matrix.shape == (round(0.4 * numel), numel)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    # Two float64 rotations of relative error well below 1e-14.
    assert (matrix @ matrix.mT - identity).abs().max() < 1e-14


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.01, 1.0), columns=st.integers(1, 60))
def test_least_squares_decodes_to_the_nearest_tensor_of_the_span(seed, density, columns):
    """x̂ and x − x̂ are orthogonal, and x̂ is its own projection: together, that x̂ is the orthogonal projection of x."""
    chosen = codec.Pipeline(transform=codec.Projection(density=density))
    x = made((8, columns), torch.float64)
    once = chosen.transform.inverse(chosen.transform.forward(x, Round(seed=seed)), (8, columns), seed=seed)
    twice = chosen.transform.inverse(
        chosen.transform.forward(once, Round(seed=seed)), (8, columns), seed=seed
    )
    # Float64 rotations of relative error well below 1e-14; their constant is a Python float.
    assert (once - twice).norm() <= 1e-13 * x.norm()
    assert ((x - once) * once).sum().abs() <= 1e-13 * x.square().sum()


def test_the_unbiased_decode_is_unbiased_and_its_error_is_what_theory_says():
    """E x̂ = x and E ‖x̂ − x‖² = (n / d − 1) ‖x‖², so the mean of N rounds is off by (n / d − 1) ‖x‖² / N, squared."""
    rounds, x = 1000, made((64,))
    chosen = codec.parse("projection(density=0.25, block=64, decode=unbiased) | float32")
    decoded = torch.stack([chosen.encode_body(x, seed=s).decoded for s in range(rounds)])
    expected = 3 * x.square().sum()
    # ‖x̂ − x‖² of one round lies in [0, 9 ‖x‖²] (‖x̂‖ ≤ 4 ‖x‖): of its mean, 5 standard deviations are below 5 · 4.5 / √N.
    assert (
        abs((decoded - x).square().sum(1).mean() - expected) < 5 * 4.5 / math.sqrt(rounds) * x.square().sum()
    )
    # A sum of 64 squares of nearly Gaussian errors: relative standard deviation √(2 / 64), times 5.
    ratio = (decoded.mean(0) - x).square().sum() / (expected / rounds)
    assert abs(ratio - 1) < 5 * math.sqrt(2 / 64)
