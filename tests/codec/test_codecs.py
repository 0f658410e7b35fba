"""The contract matrix of codecs, and their laws."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from muonwire import codec
from muonwire.codec import payload as payloads
from muonwire.codec.part import Round
from muonwire.errors import PayloadError, UsageError

TEXTS = [
    "float32",
    "bfloat16",
    "sign(scale=tensor)",
    "sign(scale=row)",
    "sign(scale=none)",
    "sign(scale=shared)",
    "topk(density=0.1) | float32",
    "topk(density=0.05) | sign(scale=tensor)",
    "topk(density=0.3) | sign(scale=row)",
    "topk(k=3) | bfloat16",
    "dct(chunk=64) | topk(k=32) | sign(scale=chunk)",
    "dct(chunk=8) | topk(k=2) | sign(scale=none)",
    "dct(chunk=8) | float32",
    "tiles(chunk=64) | topk(k=64) | codebook(bits=2, scale=tensor, fit=lloyd)",
    "tiles(chunk=4) | topk(k=2) | sign(scale=chunk)",
    "hadamard(block=1024) | float32",
    "hadamard(block=8) | topk(k=3) | sign(scale=chunk)",
    "projection(density=0.25, block=64, decode=unbiased) | float32",
    "projection(density=0.5, block=1024, decode=least_squares) | sign(scale=chunk)",
    "lowrank(rank=2, method=power, iterations=1) | float32",
    "lowrank(rank=3, method=rsvd, iterations=2) | bfloat16",
    "lowrank(rank=1, method=svd, iterations=1) | topk(density=0.5) | sign(scale=chunk)",
    "randomk(density=0.1) | float32",
    "randomk(k=3) | sign(scale=row)",
    "hadamard(block=1024) | randomk(k=5) | bfloat16",
    "turns(parts=3) | sign(scale=tensor)",
    "toprows(density=0.3) | sign(scale=row)",
    "topcolumns(k=2) | float32",
    "topblocks(size=4, density=0.2) | float32",
    "nm(n=2, m=4) | sign(scale=row)",
    "nm(n=1, m=5) | float32",
    "float64",
    "int(bits=8, scale=tensor, rounding=nearest)",
    "int(bits=5, scale=row, rounding=stochastic)",
    "topk(density=0.3) | int(bits=4, scale=row, rounding=nearest)",
    "dct(chunk=8) | topk(k=2) | int(bits=2, scale=chunk, rounding=stochastic)",
    "codebook(bits=4, scale=row, fit=lloyd)",
    "topk(density=0.3) | codebook(bits=3, scale=row, fit=gaussian)",
    "dct(chunk=8) | topk(k=2) | codebook(bits=2, scale=chunk, fit=lloyd)",
    "codebook(bits=1, scale=tensor, fit=gaussian)",
    "ternary(scale=tensor, rounding=search)",
    "topk(density=0.3) | ternary(scale=row, rounding=threshold)",
    "dct(chunk=8) | ternary(scale=chunk, rounding=stochastic)",
    "topk(k=3) | sign(scale=row) | ranks",
    "dct(chunk=8) | topk(k=2) | sign(scale=chunk) | ranks",
]
SHAPES = [
    (4, 6),
    (16, 5),
    (1, 9),
    (9, 1),
    (1, 1),
    (7,),
    (),
    (0, 3),
    (3, 0),
    (64, 96),
    (13, 17),
    (2, 3, 4, 5),
    (130,),
]


def made(shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_codec_takes_every_shape(text, dtype):
    chosen = codec.parse(text)
    for shape in SHAPES:
        x = made(shape, dtype)
        payload = chosen.encode(x)
        y = chosen.decode(payload)
        assert y.shape == x.shape, shape
        assert y.dtype == x.dtype, shape
        assert torch.equal(y, chosen.decode(payload)), shape
        assert torch.equal(chosen.encode_body(x).decoded.to(dtype), y), shape
        assert chosen.encode(x) == payload, shape


@pytest.mark.parametrize("text", TEXTS)
def test_the_textual_form_round_trips(text):
    assert str(codec.parse(text)) == text
    assert codec.parse(str(codec.parse(text))) == codec.parse(text)


def test_defaults_and_spaces_do_not_matter():
    assert codec.parse("dct|topk( k=32 )|sign(scale=chunk)") == codec.parse(
        "dct(chunk=64) | topk(k=32) | sign(scale=chunk)"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gzip", "'gzip' is not a part"),
        ("", "is not a part"),
        ("topk(density=0)", r"must lie in \(0, 1\]"),
        ("topk(density=1.5)", r"must lie in \(0, 1\]"),
        ("topk", "give exactly one"),
        ("topk(k=2, density=0.5)", "give exactly one"),
        ("topk(k=0)", "at least 1"),
        ("topk(share=0.1)", "not an option of topk"),
        ("sign(scale=col)", "allowed are none, shared, tensor, row, chunk"),
        ("dct(chunk=0)", "at least 1"),
        ("tiles(chunk=0)", "tiles: chunk is 0; it must be at least 1"),
        ("sign | dct", "comes too late"),
        ("float32 | float32", "comes too late"),
        ("dct | sign(scale=row)", "goes without a transform"),
        ("sign(scale=chunk)", "goes without a transform"),
        ("hadamard(block=0)", "at least 1"),
        ("hadamard(block=2.5)", "an integer of at least 1"),
        ("projection(density=0)", r"must lie in \(0, 1\]"),
        ("projection(block=0)", "at least 1"),
        ("projection(decode=exact)", "allowed are least_squares, unbiased"),
        ("lowrank(rank=0)", "at least 1"),
        ("lowrank(method=qr)", "allowed are power, rsvd, svd"),
        ("lowrank(iterations=0)", "method power takes an integer of at least 1"),
        ("lowrank(method=rsvd, iterations=-1)", "at least 0"),
        ("randomk", "give exactly one"),
        ("randomk(k=2.5)", "an integer of at least 1"),
        ("randomk(density=2)", r"must lie in \(0, 1\]"),
        ("randomk(scale=unbiased)", "not an option of randomk; allowed are k, density"),
        ("toprows(k=0)", "at least 1"),
        ("topcolumns(k=1, density=0.5)", "give exactly one"),
        ("topblocks(size=8)", "give exactly one"),
        ("topblocks(size=0, k=1)", "at least 1"),
        ("nm(n=5, m=4)", r"with m=4 it must be an integer in 1 ... 4"),
        ("nm(m=0)", "at least 1"),
    ],
)
def test_bad_codecs_say_what_is_allowed(text, says):
    with pytest.raises(UsageError, match=says):
        codec.parse(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["float32", "sign(scale=row)", "topk(density=0.5) | sign(scale=tensor)"])
def test_what_is_not_finite_is_not_encoded(text, value):
    with pytest.raises(UsageError, match="not finite"):
        codec.parse(text).encode(torch.tensor([1.0, value]))


def test_integers_are_not_encoded():
    with pytest.raises(UsageError, match="floating"):
        codec.parse("float32").encode(torch.tensor([1, 2]))


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(TEXTS),
    rows=st.integers(1, 20),
    columns=st.integers(1, 70),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 10_000),
)
def test_sent_and_kept_add_up_to_the_input(text, rows, columns, exponent, seed):
    chosen = codec.parse(text)
    x = made((rows, columns), seed=seed) * 10.0**exponent
    encoded = chosen.encode_body(x)
    kept = x - encoded.decoded
    # One rounding of the subtraction and one of the addition.
    tolerance = 2 * torch.finfo(torch.float32).eps * (x.abs() + encoded.decoded.abs())
    assert ((encoded.decoded + kept) - x).abs().le(tolerance).all()
    assert torch.equal(chosen.decode_body(encoded.body, (rows, columns)), encoded.decoded)


def test_density_one_without_a_quantizer_is_the_input():
    x = made((33, 20))
    assert torch.equal(
        codec.parse("topk(density=1) | float32").decode(codec.parse("topk(density=1) | float32").encode(x)), x
    )


def test_a_cosine_transform_is_orthonormal_and_undone():
    x = made((128, 96))
    chosen = codec.parse("dct(chunk=64) | float32")
    blocks = chosen.transform.forward(x, Round())
    assert blocks.shape == (2 * 2, 64 * 48)
    assert blocks.norm() == pytest.approx(x.norm().item(), rel=1e-6)
    assert torch.allclose(chosen.decode(chosen.encode(x)), x, atol=1e-5)
    # A constant chunk has one coefficient: the mean times the root of its size.
    constant = chosen.transform.forward(torch.full((64, 64), 3.0), Round())
    assert constant[0, 0] == pytest.approx(3.0 * 64, rel=1e-6)
    assert constant[0, 1:].abs().max() < 1e-4


def test_tiles_are_the_chunks_themselves():
    """Kept to the last bit, and the first of each chunk's entries is the one at its corner."""
    x = made((12, 20))
    blocks = codec.Tiles(chunk=8).forward(x, Round())
    assert blocks.shape == (2 * 4, 6 * 5)
    corners = [(row, column) for row in (0, 6) for column in (0, 5, 10, 15)]
    for block, (row, column) in zip(blocks, corners, strict=True):
        assert torch.equal(block.view(6, 5), x[row : row + 6, column : column + 5])
    assert torch.equal(codec.Tiles(chunk=8).inverse(blocks, (12, 20), seed=0), x)


def test_topk_keeps_the_largest_of_each_chunk():
    x = made((16, 24))
    chosen = codec.parse("dct(chunk=8) | topk(k=5) | float32")
    blocks = chosen.transform.forward(x, Round())
    decoded = chosen.transform.forward(chosen.decode(chosen.encode(x)), Round())
    for block, got in zip(blocks, decoded, strict=True):
        smallest_kept = block.abs().topk(5).values[-1]
        expected = torch.where(block.abs() >= smallest_kept, block, 0)
        assert torch.allclose(got, expected, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.01, 1.0))
def test_topk_commutes_with_permutations(seed, density):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 11, generator=generator)
    order = torch.randperm(x.numel(), generator=generator)
    chosen = codec.Pipeline(select=codec.TopK(density=density))
    direct = chosen.encode_body(x).decoded.flatten()[order]
    permuted = chosen.encode_body(x.flatten()[order].view_as(x)).decoded.flatten()
    assert torch.equal(direct, permuted)


def test_signs_are_scaled_by_the_mean_magnitude_of_what_shares_the_scale():
    x = torch.tensor([[1.0, -3.0, 0.0], [0.5, -0.5, 0.5]])
    by_row = codec.parse("sign(scale=row)").encode_body(x).decoded
    assert torch.allclose(by_row, torch.tensor([[4 / 3, -4 / 3, 4 / 3], [0.5, -0.5, 0.5]]), rtol=2**-8)
    by_tensor = codec.parse("sign(scale=tensor)").encode_body(x).decoded
    assert torch.allclose(by_tensor.abs(), torch.full((2, 3), 5.5 / 6), rtol=2**-8)
    assert torch.equal(codec.parse("sign(scale=none)").encode_body(x).decoded.abs(), torch.ones(2, 3))


@pytest.mark.parametrize("over", ["replicas", "senders"])
@pytest.mark.parametrize(
    "text", ["topk(density=0.2) | float32", "dct(chunk=8) | topk(k=4) | float32", "float32"]
)
def test_the_mean_of_bodies_is_the_mean_of_what_they_decode_to(text, over):
    chosen = codec.parse(text)
    xs = [made((16, 24), seed=s) for s in range(3)]
    encoded = [chosen.encode_body(x) for x in xs]
    mean = chosen.mean_bodies([e.body for e in encoded], (16, 24), over=over)
    coefficients = torch.stack([chosen.transform.forward(e.decoded, Round()) for e in encoded])
    divisor = 3 if over == "replicas" else (coefficients.abs() > 1e-6).sum(0).clamp(min=1)
    expected = chosen.transform.inverse(coefficients.sum(0) / divisor, (16, 24), seed=0)
    assert torch.allclose(mean, expected, atol=1e-5)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", [(64, 96), (512, 128), (7,)])
def test_the_estimate_is_near_the_real_size(text, shape):
    chosen = codec.parse(text)
    size, estimate = len(chosen.encode(made(shape))), chosen.estimate_bytes(shape)
    entropy_coded = chosen.select != codec.All() and not chosen.select.shared
    tolerance = 0.02 * size + 6 if entropy_coded else 4
    if getattr(chosen.quantize, "scale", None) == "chunk" and isinstance(chosen.quantize, codec.Sign):
        # Scales of chunks go as differences, of seven bits where they lie within an octave; here they may span four.
        tolerance += chosen.transform.grid(shape)[0] * 2 / 8
    assert abs(size - estimate) <= tolerance


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_payloads_are_payload_errors(data):
    chosen = codec.parse(data.draw(st.sampled_from(TEXTS)))
    original = chosen.encode(made((5, 7)))
    payload = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        payload = payload[: data.draw(st.integers(0, len(payload)))]
    assume(bytes(payload) != original)
    with pytest.raises(PayloadError):
        chosen.decode(bytes(payload))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bodies_with_a_right_checksum_decode_or_are_payload_errors(data):
    chosen = codec.parse(data.draw(st.sampled_from(TEXTS)))
    body = bytearray(chosen.encode_body(made((5, 7))).body)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    payload = payloads.pack(str(chosen), [((5, 7), torch.float32, bytes(body))])
    try:
        decoded = chosen.decode(payload)
    except PayloadError:
        return
    assert decoded.isfinite().all()
    assert decoded.shape == (5, 7)


@pytest.mark.parametrize("text", ["hadamard | float32", "lowrank(rank=1) | float32"])
def test_finite_values_that_decode_to_an_overflow_are_a_payload_error(text):
    chosen = codec.parse(text)
    head = b"\0\0\0\0" if chosen.transform.seeded else b""
    body = head + torch.full((math.prod(chosen.transform.grid((16, 16))),), 3e38).numpy().tobytes()
    with pytest.raises(PayloadError, match="overflows"):
        chosen.decode_body(body, (16, 16))
    with pytest.raises(PayloadError, match="overflows"):
        chosen.mean_bodies([body], (16, 16))
    plain = torch.full((4,), 3e38).numpy().tobytes()
    with pytest.raises(PayloadError, match="overflows"):
        codec.parse("float32").mean_bodies([plain, plain], (4,))


def test_a_payload_of_another_codec_version_or_shape_is_refused():
    payload = codec.parse("float32").encode(made((2, 3)))
    with pytest.raises(PayloadError, match="written by codec 'float32'"):
        codec.parse("bfloat16").decode(payload)
    with pytest.raises(PayloadError, match="version 9"):
        codec.parse("float32").decode(payload[:2] + b"\x09" + payload[3:])
    with pytest.raises(PayloadError, match=r"shape \(2, 3\), \(3, 2\) is expected"):
        payloads.unpack(payload, shapes=[(3, 2)])
    with pytest.raises(PayloadError, match="1 tensors, 2 are expected"):
        payloads.unpack(payload, num_tensors=2)
    with pytest.raises(PayloadError, match="not a payload of muonwire"):
        codec.parse("float32").decode(b"\x89PNG\r\n\x1a\n" + bytes(20))


def test_a_payload_that_announces_a_huge_tensor_is_refused_before_it_is_made():
    entry = ((1 << 20, 1 << 20), torch.float32, b"")
    with pytest.raises(PayloadError, match="elements"):
        codec.parse("sign(scale=none)").decode(payloads.pack("sign(scale=none)", [entry]))
    entry = ((1 << 15, 1 << 15), torch.float32, b"tiny")
    with pytest.raises(PayloadError, match="bytes of values"):
        codec.parse("sign(scale=none)").decode(payloads.pack("sign(scale=none)", [entry]))


def test_many_tensors_travel_in_one_payload():
    chosen = codec.parse("topk(density=0.5) | float32")
    xs = [made((3, 4)), made((5,)), made((0, 2))]
    entries = [(tuple(x.shape), x.dtype, chosen.encode_body(x).body) for x in xs]
    payload = payloads.pack(str(chosen), entries)
    assert [e.shape for e in payloads.unpack(payload)] == [(3, 4), (5,), (0, 2)]
    lengths = [(shape, dtype, len(body)) for shape, dtype, body in entries]
    assert len(payload) == payloads.num_bytes(str(chosen), lengths)
