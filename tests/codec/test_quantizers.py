"""Laws of the quantizers with a scale: error, bias, idempotence, and what a forged payload may do.

In every bound, 2⁻²⁴ is the relative rounding of a float32 operation, 2⁻⁸ that of bfloat16 to nearest and 2⁻⁷ that of bfloat16
upwards; 2⁻¹⁴⁹ and 2⁻¹³³ are their smallest steps, which is what rounding costs below the normal numbers.
"""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from muonwire import codec
from muonwire.codec.pack.fields import pack_fields, unpack_fields
from muonwire.codec.quantize import Layout, scales
from muonwire.codec.quantize.bits import pack_codes, unpack_codes
from muonwire.codec.quantize.codebook import gaussian_levels, lloyd_levels
from muonwire.codec.quantize.rounding import round_magnitudes, uniforms
from muonwire.codec.quantize.ternary import FACTORS, pack_trits, unpack_trits
from muonwire.errors import PayloadError, UsageError

ROOT = Path(__file__).parents[2]
LARGEST = torch.finfo(torch.float32).max
TINY = torch.finfo(torch.float32).tiny
SCALED = [
    "int(bits=2, scale={})",
    "int(bits=4, scale={})",
    "int(bits=8, scale={})",
    "int(bits=3, scale={}, rounding=stochastic)",
    "codebook(bits=1, scale={})",
    "codebook(bits=2, scale={})",
    "codebook(bits=4, scale={}, fit=gaussian)",
    "ternary(scale={}, rounding=threshold)",
    "ternary(scale={}, rounding=search)",
    "ternary(scale={}, rounding=stochastic)",
]


@st.composite
def matrices(draw):
    """Matrices of every kind: normal, heavy tails, ties on a grid, signed zeros, constants, subnormal numbers."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "ties", "zeros", "constant", "subnormal"]))
    if kind == "heavy":
        x = x**5
    elif kind == "ties":
        x = (4 * x).round() / 2
    elif kind == "zeros":
        x = torch.where(torch.rand(shape, generator=generator) < 0.7, x * 0, x)
    elif kind == "constant":
        x = torch.full(shape, float(x[0, 0]))
    if kind == "subnormal":
        return x * 2.0 ** draw(st.integers(-149, -126))
    x = x * 10.0 ** draw(st.integers(-30, 30))
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


def coded(text, x, seed=0):
    """(x in float64, decoded in float64, scales in float64 of x's rows, the body after them)."""
    chosen = codec.parse(text)
    encoded = chosen.encode_body(x, seed=seed)
    decoded = chosen.decode_body(encoded.body, tuple(x.shape))
    # Bit for bit, the signs of zeros included.
    assert torch.equal(decoded.view(torch.int32), encoded.decoded.float().view(torch.int32))
    num = x.shape[0] if chosen.quantize.scale == "row" else 1
    narrow = scales.read(encoded.body[: 2 * num], what="scale").double()
    return x.double(), decoded.double(), narrow.view(-1, 1), encoded.body[2 * num :]


def per_scale(x, narrow, how):
    return how(x.abs(), dim=1, keepdim=True) if len(narrow) == x.shape[0] else how(x.abs()).view(1, 1)


# Of float64 values that become float32 before anything else.
def narrowing(x):
    return x.abs() * 2**-24 + 2**-150


@settings(max_examples=150, deadline=None)
@given(
    x=matrices(),
    bits=st.integers(2, 8),
    scale=st.sampled_from(["tensor", "row"]),
    rounding=st.sampled_from(["nearest", "stochastic"]),
)
def test_integers_err_by_half_a_step_or_one(x, bits, scale, rounding):
    exact, decoded, step, _ = coded(f"int(bits={bits}, scale={scale}, rounding={rounding})", x)
    limit = 2 ** (bits - 1) - 1
    largest = per_scale(exact.float().double(), step, torch.amax)
    assert (step * limit >= largest).all(), "the largest value clips"
    assert (step <= largest / limit * (1 + 2**-7) + 2**-133).all()
    # v / step is rounded once, by at most 2⁻²⁴ of at most L; the product q · step is exact.
    share = {"nearest": 0.5, "stochastic": 1.0}[rounding] + limit * 2**-24
    assert ((decoded - exact).abs() <= step * share + narrowing(exact)).all()
    assert (decoded * exact >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    rounding=st.sampled_from(["nearest", "stochastic"]),
    exponent=st.integers(-120, 110),
    significand=st.integers(128, 255),
    seed=st.integers(0, 1000),
)
def test_multiples_of_a_step_pass_integers_unchanged(bits, rounding, exponent, significand, seed):
    limit = 2 ** (bits - 1) - 1
    q = torch.randint(-limit, limit + 1, (3, 20), generator=torch.Generator().manual_seed(seed))
    q[0, 0] = limit
    x = q * (significand * 2.0 ** (exponent - 7))
    exact, decoded, _, _ = coded(f"int(bits={bits}, rounding={rounding})", x)
    assert torch.equal(exact, decoded)


@settings(max_examples=150, deadline=None)
@given(
    x=matrices(),
    bits=st.integers(1, 4),
    scale=st.sampled_from(["tensor", "row"]),
    fit=st.sampled_from(["lloyd", "gaussian"]),
)
def test_a_codebook_gives_the_nearest_of_its_levels(x, bits, scale, fit):
    exact, decoded, narrow, rest = coded(f"codebook(bits={bits}, scale={scale}, fit={fit})", x)
    levels = gaussian_levels(bits) if fit == "gaussian" else scales.read(rest[: 2 << bits], what="level")
    assert (levels.diff() >= 0).all()
    offered = narrow.unsqueeze(2) * levels.double()
    nearest = (exact.unsqueeze(2) - offered).abs().amin(2)
    # v / scale, the sum of two levels and level · scale are rounded once each: the border between two levels moves by at most
    # 2⁻²⁴ (|v| + |largest level|), and a value on the wrong side errs by twice as much more.
    slack = 2 * 2**-23 * (exact.abs() + offered.abs().amax(2)) + 2**-148 + narrowing(exact)
    assert ((decoded - exact).abs() <= nearest + slack).all()


@settings(max_examples=150, deadline=None)
@given(
    x=matrices(),
    scale=st.sampled_from(["tensor", "row"]),
    rounding=st.sampled_from(["threshold", "search"]),
)
def test_ternary_keeps_the_largest_at_their_mean(x, scale, rounding):
    exact, decoded, narrow, _ = coded(f"ternary(scale={scale}, rounding={rounding})", x)
    exact = exact.float().double()
    rows = exact.view(len(narrow), -1)
    for row, got, s in zip(rows, decoded.view(len(narrow), -1), narrow.view(-1), strict=True):
        magnitude = row.abs()
        # The mean of what is kept is lost below half of bfloat16's smallest number, or where that is nothing.
        if s == 0:
            assert magnitude.max() <= 2**-134 or magnitude.max() <= FACTORS[0] * TINY
            continue
        kept = got != 0
        assert torch.equal(got, torch.where(kept, row.sign() * s, 0))
        kept_mean = magnitude[kept].mean()
        assert (s - kept_mean).abs() <= 2**-8 * kept_mean + 2**-134
        assert not bool((~kept).any()) or magnitude[~kept].max() <= magnitude[kept].min()
        # The threshold is a mean times a constant, three float32 roundings and a float64 sum.
        mean = max(magnitude.mean(), TINY)
        thresholds = [f * mean for f in (FACTORS if rounding == "search" else FACTORS[:1])]
        largest_dropped = magnitude[~kept].max() if bool((~kept).any()) else 0.0
        slack = 1 + 4 * 2**-24
        assert any(t * slack >= largest_dropped and t <= magnitude[kept].min() * slack for t in thresholds)


@settings(max_examples=100, deadline=None)
@given(x=matrices(), scale=st.sampled_from(["tensor", "row"]), seed=st.integers(0, 2**32 - 1))
def test_stochastic_ternary_errs_by_less_than_its_scale(x, scale, seed):
    exact, decoded, narrow, _ = coded(f"ternary(scale={scale}, rounding=stochastic)", x, seed=seed)
    largest = per_scale(exact.float().double(), narrow, torch.amax)
    assert (narrow >= largest).all()
    assert (narrow <= largest * (1 + 2**-7) + 2**-133).all()
    assert torch.equal(decoded.abs(), torch.where(decoded != 0, narrow, 0))
    assert (decoded * exact >= 0).all()
    assert ((decoded - exact).abs() <= narrow + narrowing(exact)).all()


def test_ternary_search_finds_the_best_of_its_thresholds_on_real_momenta():
    for name, x in load_file(ROOT / "benchmarks" / "data" / "momentum.safetensors").items():
        magnitude = x.double().abs()
        size = float(magnitude.square().sum())
        errors = []
        for factor in FACTORS:
            kept = magnitude > factor * magnitude.mean()
            s = magnitude[kept].mean() if bool(kept.any()) else 0.0
            errors.append(float((magnitude - s * kept).square().sum()) / size)
        for rounding, wanted in (("search", min(errors)), ("threshold", errors[0])):
            decoded = codec.parse(f"ternary(rounding={rounding})").encode_body(x).decoded.double()
            error = float((decoded - x.double()).square().sum()) / size
            # Around the mean m of the n kept values the error grows by n (s − m)², with |s − m| ≤ 2⁻⁸ m and n m² ≤ ‖v‖²; a value on
            # a threshold may be counted on either side of it.
            assert abs(error - wanted) <= 2**-16 + 1e-6, (name, rounding)
        assert min(errors) < errors[0], name


@pytest.mark.parametrize(
    "text",
    ["int(bits=2, rounding=stochastic)", "int(bits=4, rounding=stochastic)", "ternary(rounding=stochastic)"],
)
def test_stochastic_rounding_has_no_bias(text):
    x = torch.randn(40, 10, generator=torch.Generator().manual_seed(3))
    rounds = 500
    total = torch.zeros(x.shape, dtype=torch.float64)
    for seed in range(rounds):
        exact, decoded, narrow, _ = coded(text, x, seed=seed)
        total += decoded
    step = narrow.item()
    # Hoeffding: errors of range ``step`` have a mean over t with a chance of at most 2 exp(−2 n t² / step²); for all 400 values
    # together 1e-9. The draws are multiples of 2⁻²⁴ and v / step is rounded: another 2⁻²⁴ (1 + L) of a step.
    t = step * (math.sqrt(math.log(2 * x.numel() / 1e-9) / (2 * rounds)) + 8 * 2**-24)
    assert (total / rounds - exact).abs().max() <= t


def test_replicas_with_other_values_draw_other_noise():
    replicas, shape = 64, (64, 64)
    mean_error = torch.zeros(shape, dtype=torch.float64)
    for r in range(replicas):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(r))
        exact, decoded, step, _ = coded("int(bits=3, rounding=stochastic)", x, seed=5)
        mean_error += (decoded - exact) / step / replicas
    # The error of one is f − f² steps² over a random fraction f, at most 1/4. Independent ones average to 1/(4 · 64) at most;
    # from the same draws the covariance min(f, g) − f g stays: 1/12 over random fractions.
    assert mean_error.square().mean() <= 1 / (4 * replicas)
    assert not torch.equal(uniforms(torch.ones(8), seed=5), uniforms(torch.zeros(8), seed=5))
    assert not torch.equal(uniforms(torch.ones(8), seed=5), uniforms(torch.ones(8), seed=6))


def test_draws_are_pinned():
    """Philox4x64-10 with the key seed · 2³² + CRC-32, which no version of numpy may change."""
    draws = uniforms(torch.zeros(4), seed=1)
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert (draws * 2**24).long().tolist() == [14897782, 14871511, 4145558, 3949533]


def test_magnitudes_round_up_as_often_as_their_fraction_says():
    draws = torch.arange(256) / 256
    for x in (0.0, 0.25, 2.0, 3.125, 5.99609375):
        assert round_magnitudes(torch.full((256,), x), draws).mean() == x


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    ("kind", "least"),
    [
        # The least squared error of 2^bits levels: Max (1960), table I; Adams and Giesler (1978) for Laplace.
        ("gaussian", {2: 0.1175, 3: 0.03454, 4: 0.009497}),
        ("laplace", {2: 0.1762, 3: 0.0545, 4: 0.0154}),
    ],
)
def test_fitted_codebooks_come_near_the_least_error_there_is(bits, kind, least):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=generator)
    if kind == "laplace":
        uniform = torch.rand(1 << 16, generator=generator, dtype=torch.float64) - 0.5
        x = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    exact, decoded, _, _ = coded(f"codebook(bits={bits})", x.view(256, 256))
    error = (decoded - exact).square().sum() / exact.square().sum()
    # The sample's own error is off by a few roots of 1/65536 (more with Laplace's tails), and the iteration ends before its limit.
    assert error == pytest.approx(least[bits], rel=0.04)
    assert (decoded - exact).mean().abs() <= 2**-7 * exact.abs().mean()
    if kind == "gaussian":
        exact, decoded, _, _ = coded(f"codebook(bits={bits}, fit=gaussian)", x.view(256, 256))
        assert (decoded - exact).square().sum() / exact.square().sum() == pytest.approx(least[bits], rel=0.02)


def test_on_real_momenta_fitting_beats_fixed_levels_and_uniform_ones():
    for name, x in load_file(ROOT / "benchmarks" / "data" / "momentum.safetensors").items():
        for bits in (2, 3, 4):
            error = {
                text: float((codec.parse(text).encode_body(x).decoded.float() - x.float()).square().sum())
                for text in (
                    f"codebook(bits={bits})",
                    f"codebook(bits={bits}, fit=gaussian)",
                    f"int(bits={bits})",
                )
            }
            assert error[f"codebook(bits={bits})"] == min(error.values()), (name, bits, error)


def test_lloyds_levels_are_the_means_of_what_is_nearest_to_them():
    # Numbers of bfloat16, so that no cell of the fit lies across a border.
    x = (torch.randn(5000, generator=torch.Generator().manual_seed(1)) ** 3).bfloat16().float()
    levels = lloyd_levels(x, 2)
    cells = torch.bucketize(x.double(), (levels[1:] + levels[:-1]) / 2)
    for i, level in enumerate(levels):
        assert x[cells == i].double().mean() == pytest.approx(float(level), rel=1e-9)


@pytest.mark.parametrize("text", SCALED)
@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_zeros_stay_zeros_and_the_largest_numbers_stay_finite(text, scale):
    chosen = codec.parse(text.format(scale))
    zeros = torch.zeros(3, 5)
    assert torch.equal(chosen.encode_body(zeros).decoded, zeros)
    x = torch.full((3, 5), LARGEST) * torch.tensor([1.0, -1.0, 1.0, 0.5, 0.0])
    for extreme in (x, x.bfloat16().clamp(-3.38e38, 3.38e38), x.double() * 1e100):
        exact, decoded, _, _ = coded(text.format(scale), extreme)
        assert decoded.isfinite().all()
        assert (decoded * exact >= 0).all() or "codebook" in text
    if "bits=8" in text:
        # The step is held down so that L steps are finite, by at most one bfloat16 rounding (2⁻⁷).
        exact, decoded, _, _ = coded(text.format(scale), x)
        assert ((decoded - exact).abs() <= 2**-7 * LARGEST).all()


@pytest.mark.parametrize("text", [t for t in SCALED if "stochastic" not in t])
def test_a_scale_a_row_is_each_row_alone(text):
    if "codebook" in text and "gaussian" not in text:
        text = text.replace("scale={}", "scale={}, fit=gaussian")  # fitted levels are shared by all rows
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1.0], [0.0], [50.0]]
    )
    together = codec.parse(text.format("row")).encode_body(x).decoded
    for row, got in zip(x, together, strict=True):
        assert torch.equal(codec.parse(text.format("tensor")).encode_body(row).decoded, got)


@pytest.mark.parametrize("text", SCALED)
def test_a_scale_a_chunk_is_that_of_the_values_selected_in_it(text):
    """Scattered values find their scale through an index, whole blocks through a reshape: both are one rule."""
    quantize = codec.parse(text.format("row")).quantize
    values = torch.randn(4 * 30, generator=torch.Generator().manual_seed(0)) ** 3
    whole = Layout(num_blocks=4, block_numel=30, positions=None)
    scattered = Layout(num_blocks=4, block_numel=30, positions=torch.arange(120))
    (data, decoded), (scattered_data, _) = (
        (b"".join(field.write(field.values.numpy()) for field in fields), decode())
        for fields, decode in (quantize.encode(values, layout, seed=1) for layout in (whole, scattered))
    )
    assert scattered_data == data
    assert torch.equal(quantize.decode(data, 120, scattered).values, decoded)


@given(
    codes=st.lists(st.integers(0, 255), max_size=70),
    width=st.integers(1, 8),
)
def test_codes_are_packed_as_fields_are(codes, width):
    array = np.array(codes, dtype=np.int64) & ((1 << width) - 1)
    data = pack_codes(array.astype(np.uint8), width)
    assert data == pack_fields(array, width)
    assert unpack_codes(data, len(codes), width).tolist() == array.tolist()
    assert unpack_fields(data, len(codes), width).tolist() == array.tolist()


@given(st.lists(st.integers(0, 2), max_size=33))
def test_digits_to_base_three_round_trip(digits):
    data = pack_trits(np.array(digits, dtype=np.uint8))
    assert len(data) == -(-len(digits) // 5)
    assert unpack_trits(data, len(digits)).tolist() == digits


def number(value):
    return torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("text", "body", "says"),
    [
        ("int(bits=8)", number(math.inf) + bytes(4), "a step is not finite"),
        ("int(bits=8)", number(math.nan) + bytes(4), "a step is not finite"),
        ("int(bits=8)", number(3e37) + bytes(4), "not a finite float32 number"),
        ("int(bits=8)", number(1.0) + b"\x00\x01\xff\x02", "code 255, over 254"),
        ("int(bits=2)", number(1.0) + b"\x03", "code 3, over 2"),
        ("int(bits=4)", number(1.0) + bytes(3), "4 values of int.* take 4"),
        ("codebook(bits=1)", number(-math.inf) + bytes(5), "a scale is not finite"),
        (
            "codebook(bits=1)",
            number(1.0) + number(0.0) + number(math.nan) + bytes(1),
            "a level is not finite",
        ),
        ("codebook(bits=1)", number(1e30) + number(0.0) + number(-1e30) + bytes(1), "not a finite float32"),
        ("codebook(bits=4, fit=gaussian)", number(2e38) + bytes(2), "not a finite float32 number"),
        ("ternary", number(math.nan) + bytes(1), "a scale is not finite"),
        ("ternary", number(1.0) + b"\xf3", "byte 243 is not five digits"),
        ("float64", np.array([1.0, math.inf, 0.0, 0.0]).tobytes(), "not finite"),
    ],
)
def test_forged_bodies_are_payload_errors(text, body, says):
    with pytest.raises(PayloadError, match=says):
        codec.parse(text).decode_body(body, (4,))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("int(bits=1)", "from 2 to 8"),
        ("int(bits=2.5)", "from 2 to 8"),
        ("int(scale=none)", "allowed are tensor, row, chunk"),
        ("int(rounding=up)", "allowed are nearest, stochastic"),
        ("codebook(bits=5)", "from 1 to 4"),
        ("codebook(fit=kmeans)", "allowed are lloyd, gaussian"),
        ("ternary(rounding=nearest)", "allowed are threshold, search, stochastic"),
        ("dct | int(scale=row)", r"int\(bits=8, scale=row, rounding=nearest\) after transform"),
        ("ternary(scale=chunk)", "a scale per chunk with one"),
    ],
)
def test_bad_options_say_what_is_allowed(text, says):
    with pytest.raises(UsageError, match=says):
        codec.parse(text)


def test_float64_rounds_nothing():
    x = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen = codec.parse("float64")
    assert torch.equal(chosen.decode(chosen.encode(x)), x)
    mean = chosen.mean_bodies([chosen.encode_body(x).body, chosen.encode_body(3 * x).body], (6, 7))
    assert torch.equal(mean, (x + 3 * x) / 2)


_HASH = """
import hashlib, sys, torch
from muonwire import codec
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(300, 257, generator=torch.Generator().manual_seed(0))
for text in sys.argv[2:]:
    chosen = codec.parse(text)
    body = chosen.encode_body(x, seed=9).body
    decoded = chosen.decode_body(body, (300, 257))
    print(hashlib.sha256(body).hexdigest(), hashlib.sha256(decoded.numpy().tobytes()).hexdigest())
"""


def test_another_process_with_more_threads_makes_the_same_bytes():
    texts = ["int(bits=4, scale=row, rounding=stochastic)", "codebook(bits=2, fit=gaussian)"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", _HASH, "2", *texts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    x = torch.randn(300, 257, generator=torch.Generator().manual_seed(0))
    expected = []
    for text in texts:
        encoded = codec.parse(text).encode_body(x, seed=9)
        expected += [encoded.body, encoded.decoded.numpy().tobytes()]
    assert done.stdout.split() == [hashlib.sha256(data).hexdigest() for data in expected]
