"""Each fast path against the slow one that says what it must give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import codec
from muonwire.bench.codec import demo_decode, demo_encode
from muonwire.codec import memory
from muonwire.codec.finite import all_finite
from muonwire.codec.part import Round
from muonwire.codec.transform import dct
from muonwire.errors import PayloadError


def plain_topk(blocks, k):
    """The k largest magnitudes of each row by a stable sort, so that of equal ones the first are taken."""
    order = np.argsort(-blocks.abs().double().numpy(), axis=1, kind="stable")[:, :k]
    return (np.sort(order, axis=1) + np.arange(len(blocks))[:, None] * blocks.shape[1]).reshape(-1)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 60),
    k=st.integers(1, 60),
    kind=st.sampled_from(["normal", "few values", "zeros", "subnormal", "huge", "signed zeros"]),
    seed=st.integers(0, 1000),
    strip=st.sampled_from([1, 16, 1 << 17]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_topk_is_a_stable_sort(rows, columns, k, kind, seed, strip, dtype):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x = {
        "normal": x,
        "few values": x.round(),
        "zeros": torch.zeros_like(x),
        "subnormal": x * 1e-40,
        "huge": (x * 3e38).clamp(-3.4e38, 3.4e38),
        "signed zeros": torch.where(x > 0, 0.0, -0.0),
    }[kind].to(dtype)
    before, memory.STRIP_NUMEL = memory.STRIP_NUMEL, strip
    try:
        assert (codec.TopK(k=k).choose(x).numpy() == plain_topk(x, min(k, columns))).all()
        density = k / 60
        count = min(x.numel(), max(1, round(density * x.numel())))
        assert (codec.TopK(density=density).choose(x).numpy() == plain_topk(x.reshape(1, -1), count)).all()
    finally:
        memory.STRIP_NUMEL = before


@pytest.mark.parametrize("strip", [1, 64, 1 << 17])
@pytest.mark.parametrize("shape", [(5, 7), (16, 8), (33, 3), (1, 9), (40, 64)])
@pytest.mark.parametrize("scale", ["row", "tensor", "none"])
def test_signs_are_the_sign_times_the_scale(strip, shape, scale, monkeypatch):
    monkeypatch.setattr(memory, "STRIP_NUMEL", strip)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x[0, 0], x[-1, -1] = 0.0, -0.0
    magnitude = x.abs().double()
    means = {
        "row": magnitude.mean(1, keepdim=True),
        "tensor": magnitude.mean(),
        "none": torch.tensor(1.0, dtype=torch.float64),
    }[scale]
    decoded = codec.parse(f"sign(scale={scale})").encode_body(x).decoded
    assert torch.equal(decoded > 0, x >= 0)
    # One rounding to bfloat16, whose eps is 2^-7, and the float32 mean's of at most 2^-20 on these few values.
    assert torch.allclose(decoded.abs().double(), means.expand(shape), rtol=2**-8 + 2**-19, atol=0)


def test_scales_of_values_whose_sum_overflows_are_finite():
    x = torch.full((4, 8), 3.4e38)
    for text in ("sign(scale=row)", "sign(scale=tensor)", "topk(density=0.5) | sign(scale=tensor)"):
        chosen = codec.parse(text)
        decoded = chosen.decode(chosen.encode(x))
        # The largest bfloat16 is 2^-8 below the largest float32.
        assert decoded.max().item() == pytest.approx(3.4e38, rel=2**-7)


def test_uneven_blocks_have_the_mean_of_their_own_values():
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 6).unsqueeze(1)
    encoded = codec.parse("topk(density=0.2) | sign(scale=row)").encode_body(x)
    for row, sent in zip(encoded.decoded, encoded.selected, strict=True):
        values = sent[sent != 0]
        expected = values.abs().double().mean() if len(values) else 0.0
        assert row.abs().max().item() == pytest.approx(float(expected), rel=2**-8 + 2**-19)


@pytest.mark.parametrize("strip", [1, 1 << 10, 1 << 17])
@pytest.mark.parametrize(
    ("shape", "chunk"), [((128, 96), 64), ((24, 40), 8), ((7, 12), 4), ((64,), 8), ((12, 3, 4), 4)]
)
def test_the_cosine_transform_is_two_products_a_chunk(strip, shape, chunk, monkeypatch):
    monkeypatch.setattr(memory, "STRIP_NUMEL", strip)
    monkeypatch.setattr(dct, "SMALLEST_CHOSEN", 1)
    chosen = codec.Dct(chunk=chunk)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    num_rows, height, num_columns, width = chosen._chunks(shape)
    left, right = chosen._bases(height, width, x)
    chunks = x.reshape(num_rows, height, num_columns, width).transpose(1, 2)
    plain = (left @ chunks @ right.mT).reshape(chosen.grid(shape))
    blocks = chosen.forward(x, Round())
    # Sums of at most 2 · 64 products of values of order 1: 128 eps = 2^-16, and their like in the inverse.
    assert torch.allclose(blocks, plain, atol=2**-15)
    assert torch.allclose(chosen.inverse(blocks, shape, seed=0), x, atol=2**-14)
    k = min(3, blocks.shape[1])
    positions = codec.TopK(k=k).choose(blocks)
    values = blocks.reshape(-1)[positions]
    full = torch.zeros_like(blocks).view(-1).index_put((positions,), values).view_as(blocks)
    got = chosen.inverse_chosen(values, positions, shape, per_block=k, seed=0)
    assert torch.allclose(got, chosen.inverse(full, shape, seed=0), atol=2**-14)


def test_the_oracle_decodes_to_what_the_codec_does():
    x = torch.randn(128, 192, generator=torch.Generator().manual_seed(2))
    chosen = codec.parse("dct(chunk=64) | topk(k=32) | float32")
    parts = demo_encode(x, chunk=64, k=32)
    assert len(parts[0]) + len(parts[1]) == 12 * 32 * 6
    assert torch.allclose(demo_decode(parts, (128, 192)), chosen.decode(chosen.encode(x)), atol=2**-14)


def test_the_codec_takes_a_tenth_of_the_oracles_bytes():
    """Index sets at their entropy (8.4 bits), one bit of sign and a scale for 32 values, against 12 bytes a coefficient."""
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(2))
    size = len(codec.parse("dct(chunk=64) | topk(k=32) | sign(scale=chunk)").encode(x))
    assert size < sum(map(len, demo_encode(x))) / 10


@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_scales_of_chunks_are_exact(spread):
    """bfloat16 scales come back to the last bit however far apart they lie."""
    scales = torch.exp2(torch.randn(50, generator=torch.Generator().manual_seed(0)) * spread).bfloat16()
    scales[3] = 0
    quantize = codec.Sign(scale="chunk")
    data = quantize._pack_scales(scales.view(torch.int16).numpy())
    read, length = quantize._unpack_scales(data, 50)
    assert length == len(data)
    assert torch.equal(read, scales.float())
    with pytest.raises(PayloadError, match="end in the 50 scales"):
        quantize._unpack_scales(data[:-1], 50)
    with pytest.raises(PayloadError, match="not finite"):
        quantize._unpack_scales(b"\xff\x7f" + data[2:], 50)


def test_a_finite_tensor_is_told_from_one_that_is_not():
    assert all_finite(torch.full((100,), 3e38))
    assert all_finite(torch.zeros(0))
    for value in (torch.inf, -torch.inf, torch.nan):
        assert not all_finite(torch.tensor([1.0, value]))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf]))
