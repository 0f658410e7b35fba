import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

from muonwire.errors import UsageError
from muonwire.polar import METHODS, PROCESSORS, adaptive, clear_buffers, explain, polar, polar_list
from muonwire.polar.quality import polar_error
from tests.polar.polar_inputs import SPECTRA, gaussian, spectrum
from tests.slow import slow_unless

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (8, 8),
    (8, 24),
    (24, 8),
    (3, 8, 24),
    (2, 3, 8, 8),
    (0, 5),
    (5, 0),
    (0, 4, 4),
]
# Of the polar factor, in the worst case of these shapes and 16-bit input.
LARGEST_ERROR = {"auto": 0.35, "halley": 0.165, "adaptive": 0.05, "newton_schulz": 0.35, "gram": 0.35}


def reference(x):
    return _zeropower_via_newtonschulz(x, (3.4445, -4.775, 2.0315), 5, 1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_contract(method, dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = x.clone()
    q = polar(x, method=method)
    assert q.shape == x.shape
    assert q.dtype == dtype
    assert torch.equal(x, before)
    assert torch.isfinite(q).all()
    assert torch.equal(q, polar(x, method=method))
    if x.numel():
        for a, b in zip(q.reshape(-1, *shape[-2:]), x.reshape(-1, *shape[-2:]), strict=True):
            limit = LARGEST_ERROR.get(method, 0.05 if dtype.itemsize == 2 else 1e-3)
            assert polar_error(a, b) < limit


@pytest.mark.parametrize("shape", [(16, 16), (300, 320), (64, 256), (256, 64)])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_jordan_is_bit_exact_with_torch(shape, input_dtype):
    x = gaussian(*shape).to(input_dtype)
    q = polar(x, method="newton_schulz", schedule="jordan", dtype=torch.bfloat16)
    assert torch.equal(q, reference(x).to(input_dtype))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [(8, 24), (200, 256)])
def test_zero_gives_zeros(method, dtype, shape):
    assert torch.equal(polar(torch.zeros(shape, dtype=dtype), method=method), torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("method", METHODS)
# The outermost, and one on each side between them.
@pytest.mark.parametrize(
    "scale",
    slow_unless(
        lambda _, scale: scale in (1e-30, 1e-4, 1e8, 1e30),
        [(s,) for s in (1e-30, 1e-20, 1e-8, 1e-4, 1e4, 1e8, 1e20, 1e30)],
    ),
)
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [(8, 24), (200, 256)])
def test_scale_does_not_matter(method, scale, dtype, shape):
    if shape[0] > 100 and method in ("newton", "qdwh", "svd"):
        shape = (20, 24)
    x = gaussian(*shape)
    stored = (x * scale).to(dtype if dtype != torch.float16 else torch.float32)
    q = polar(stored, method=method, dtype=dtype if method in ("auto", "adaptive", "gram") else None)
    assert torch.isfinite(q).all()
    assert polar_error(q, stored.double() / scale) < 0.35


# newton needs full rank; the slow exact methods are tested on the small matrix.
RANK_ONE = [(m, 24) for m in METHODS if m != "newton"]
RANK_ONE += [(m, 200) for m in METHODS if m not in ("newton", "svd", "qdwh")]


@pytest.mark.parametrize(("method", "n"), RANK_ONE)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_rank_one_is_found_and_bounded(method, dtype, n):
    x = (gaussian(n, 1) @ gaussian(1, n, 2)).to(dtype)
    q = polar(x, method=method)
    assert torch.isfinite(q).all()
    values, inner = torch.linalg.svdvals(q.double()), (q.double() * x.double()).sum()
    assert values[0] < 1.6
    assert inner / torch.linalg.vector_norm(x.double()) > 0.6


@pytest.mark.parametrize("method", METHODS)
def test_batch_with_one_zero_matrix(method):
    x = torch.stack([gaussian(8, 24), torch.zeros(8, 24), gaussian(8, 24, 5)])
    q = polar(x, method=method)
    assert torch.equal(q[1], torch.zeros(8, 24))
    for index in (0, 2):
        assert polar_error(q[index], x[index]) < 0.35
        torch.testing.assert_close(q[index], polar(x[index], method=method), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(2, 8, 24), (2, 200, 256)])
def test_nonfinite_is_named_or_propagated(method, bad, shape):
    if shape[1] > 100 and method in ("newton", "qdwh", "svd"):
        shape = (2, 20, 24)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[1, 3, 4] = bad
    with pytest.raises(UsageError, match=r"not finite, the first at .*3, 4\)"):
        polar(x, method=method)
    q = polar(x, method=method, nonfinite="propagate")
    assert torch.isfinite(q[0]).all()
    assert torch.isnan(q[1]).all()


@pytest.mark.parametrize("method", METHODS)
def test_noncontiguous(method):
    x = gaussian(48, 32)[::2, ::2].mT
    torch.testing.assert_close(
        polar(x, method=method), polar(x.contiguous(), method=method), rtol=0.05, atol=0.02
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: polar(torch.zeros(3)),
        lambda: polar(torch.zeros(3, 3, dtype=torch.int64)),
        lambda: polar(torch.zeros(3, 3), method="nope"),
        lambda: polar(torch.zeros(3, 3), method="svd", schedule="jordan"),
        lambda: polar(torch.zeros(3, 3), method="newton_schulz", schedule="nope"),
        lambda: polar(torch.zeros(3, 3), nonfinite="ignore"),
        lambda: adaptive(torch.zeros(3, 3), error=0.0),
        lambda: explain(torch.zeros(0, 3)),
    ],
)
def test_bad_input_is_a_usage_error(call):
    with pytest.raises(UsageError):
        call()


@pytest.mark.parametrize("name", list(SPECTRA))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_is_no_less_accurate_than_torch(name, dtype):
    x = spectrum(name)
    row = PROCESSORS["amx" if dtype == torch.bfloat16 else "avx2"]
    assert polar_error(polar(x, dtype=dtype, processor=row), x) <= polar_error(reference(x), x)


def test_auto_is_no_less_accurate_than_torch_on_small_matrices():
    for seed in range(8):
        x = gaussian(64, 64 + 32 * seed, seed)
        assert polar_error(polar(x), x) <= polar_error(reference(x), x)


def test_list_of_mixed_shapes_is_as_one_by_one():
    xs = [
        gaussian(8, 24),
        gaussian(200, 256),
        gaussian(8, 24, 2),
        gaussian(24, 8),
        torch.zeros(0, 3),
        gaussian(200, 256, 3),
    ]
    for q, x in zip(polar_list(xs), xs, strict=True):
        torch.testing.assert_close(q, polar(x), rtol=0.05, atol=0.05)
    assert polar_list([]) == []


def test_result_owns_its_memory():
    x, y = gaussian(200, 256), gaussian(200, 256, 1)
    first = polar(x)
    kept = first.clone()
    polar(y)
    assert torch.equal(first, kept)
    clear_buffers()
    assert torch.equal(polar(x), kept)


def test_works_under_inference_mode_and_after_it():
    x = gaussian(200, 256)
    clear_buffers()
    with torch.inference_mode():
        first = polar(x)
    assert torch.equal(first, polar(x))


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 99), method=st.sampled_from(METHODS))
def test_orthogonal_equivariance_and_transpose(m, n, seed, method):
    x = gaussian(m, n, seed).double()
    q = polar(x, method=method, dtype=torch.float32)
    # An ill-conditioned draw amplifies the rounding that the two orders differ in.
    values = torch.linalg.svdvals(x)
    tolerance = 1e-4 * float(values[0] / values[-1].clamp(min=1e-6)) + 1e-3
    # The adaptive plan for the transpose may be another one, within the requested error of 0.02 each.
    chosen = 0.06 * min(m, n) ** 0.5 if method == "adaptive" else 0.0
    flipped = polar(x.mT, method=method, dtype=torch.float32).mT
    torch.testing.assert_close(flipped, q, rtol=0, atol=tolerance + chosen)
    torch.testing.assert_close(polar(-x, method=method, dtype=torch.float32), -q, rtol=0, atol=tolerance)


def test_explain():
    told = explain(gaussian(256, 1024))
    assert told.method == "adaptive"
    assert told.report is not None
    assert told.report.flops < told.report.reference_flops / 3
    assert "GFLOP against" in str(told)
    assert explain(torch.zeros(256, 1024)).method == "zero"
    assert explain(gaussian(16, 16)).method == "halley"
    assert explain(gaussian(16, 16), dtype=torch.bfloat16).method == "newton_schulz"
