"""Codecs on a device that is not the host: the bytes of the CPU, and nothing but them crosses.

The device is the stand-in of benchmarks/standin.py, which fails where an accelerator would.
"""

import math

import numpy as np
import pytest
import torch
from benchmarks.standin import DEVICE, StandIn
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire import codec
from muonwire.codec import host, packing, payload
from muonwire.codec.finite import Checks, each_finite
from muonwire.codec.host import counts_of, fetch, flagged, running_sums
from muonwire.codec.quantize.bits import pack_codes
from muonwire.errors import PayloadError, UsageError

QUANTIZERS = (
    "float32",
    "bfloat16",
    "float64",
    "sign(scale=none)",
    "sign(scale=tensor)",
    "sign(scale=row)",
    "ternary(scale=row)",
    "ternary(rounding=threshold)",
    "ternary(rounding=stochastic)",
    "int(bits=8)",
    "int(bits=3, scale=row)",
    "codebook(bits=2, scale=row)",
    "codebook(bits=3, fit=gaussian)",
)
SELECTIONS = (
    "topk(k=5)",
    "topk(density=0.03)",
    "randomk(density=0.1)",
    "nm(n=2, m=4)",
    "toprows(density=0.2)",
    "topcolumns(k=3)",
    "topblocks(size=4, density=0.1)",
)
TRANSFORMS = (
    "tiles(chunk=16)",
    "hadamard(block=64)",
    "projection(block=64)",
    "dct(chunk=16)",
    "lowrank(rank=2)",
)
PLAIN = (
    *QUANTIZERS,
    *(f"{select} | {values}" for select in SELECTIONS for values in ("bfloat16", "sign(scale=row)")),
    *(f"{t} | sign(scale=chunk)" for t in TRANSFORMS),
    "dct(chunk=16) | topk(k=4) | sign(scale=none)",
    "tiles(chunk=16) | topk(k=8) | codebook(bits=2, scale=chunk)",
    "hadamard(block=64) | randomk(k=7) | int(bits=4, scale=chunk)",
)
INPUTS = (
    ((48, 64), torch.float32),
    ((11, 7), torch.bfloat16),
    ((5,), torch.float32),
    ((0, 4), torch.float32),
)


def made(shape, *, seed=0, dtype=torch.float32):
    """Values with a heavy tail, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).pow(3).mul(8).round().div(8).to(dtype)


def products_differ(text):
    """Whether a transform is a product of matrices, which torch rounds as its shapes are cut."""
    return text.startswith(("dct", "lowrank"))


@pytest.mark.parametrize("text", PLAIN)
def test_a_device_writes_the_bytes_of_the_cpu_and_reads_them_to_the_same_bits(text):
    chosen = codec.parse(text)
    for shape, dtype in INPUTS:
        x = made(shape, dtype=dtype)
        with StandIn() as device:
            encoded = chosen.encode_body(x.to(DEVICE), seed=3)
            crossed = device.to_host.num_bytes
            body = encoded.body
            decoded = encoded.decoded.cpu()
            again = chosen.decode_body(body, shape, device=DEVICE).cpu()
            mean = chosen.mean_bodies([body] * 3, shape, device=DEVICE).cpu()
        on_cpu = chosen.encode_body(x, seed=3)
        # The sender's own and everybody's are the same, whatever the transform.
        assert torch.equal(decoded, again)
        if products_differ(text):
            # Scales are within 2⁻⁸ of each other, and a coefficient of nearly zero may change its sign.
            assert len(body) == len(on_cpu.body)
            scale = float(x.float().abs().max()) if x.numel() else 0.0
            torch.testing.assert_close(decoded, chosen.decode_body(body, shape), atol=1e-5 * scale, rtol=1e-5)
        else:
            assert body == on_cpu.body
            assert torch.equal(decoded, on_cpu.decoded)
            assert torch.equal(mean, chosen.mean_bodies([body] * 3, shape))
        if "stochastic" not in text:
            assert crossed == 0


def test_means_over_senders_are_those_of_the_cpu():
    chosen = codec.parse("topk(density=0.1) | bfloat16")
    bodies = [chosen.encode_body(made((20, 30), seed=s)).body for s in range(3)]
    with StandIn():
        there = chosen.mean_bodies(bodies, (20, 30), over="senders", device=DEVICE).cpu()
    assert torch.equal(there, chosen.mean_bodies(bodies, (20, 30), over="senders"))


@pytest.mark.parametrize(
    ("text", "largest"),
    [
        # Bytes an entry, and of each scale four, as which it goes to the device.
        ("sign(scale=tensor)", 1 / 8 + 16 / 4096),
        ("sign(scale=row)", 1 / 8 + (4 * 64 + 8) / 4096),
        ("ternary(scale=tensor)", 1 / 5 + 16 / 4096),
        ("int(bits=4)", 1 / 2 + 16 / 4096),
        ("codebook(bits=2)", 1 / 4 + 32 / 4096),
        # Four bytes a chosen place, two a value.
        ("topk(density=0.05) | bfloat16", 0.05 * 6.1),
        # A number below 4,096 in two bytes.
        ("dct(chunk=64) | topk(k=32) | sign(scale=none)", 32 / 4096 * (2 + 1 / 8)),
        ("nm(n=2, m=4) | sign(scale=tensor)", 1 / 2 * (1 / 4 + 1 / 8) + 16 / 4096),
    ],
)
def test_what_is_sent_crosses_once_and_what_is_decoded_does_not(text, largest):
    chosen = codec.parse(text)
    x = made((64, 64))
    with StandIn() as device:
        there = x.to(DEVICE)
        device.forget()
        encoded = chosen.encode_body(there)
        encoded.decoded, encoded.selected  # noqa: B018 - they are made on the device
        assert device.to_host.count == 0
        body = encoded.body
        assert device.to_host.count == 1
        assert device.to_host.num_bytes <= largest * x.numel()
        device.forget()
        chosen.mean_bodies([body, body, body], (64, 64), device=DEVICE)
        assert device.to_host.count == device.blocking == 0
        assert device.to_device.num_bytes <= 3 * largest * x.numel()


def test_the_host_waits_once_for_many_tensors():
    with StandIn() as device:
        tensors = [
            torch.arange(3, device=DEVICE).to(dtype) for dtype in (torch.uint8, torch.int16, torch.float64)
        ]
        device.forget()
        found = fetch([*tensors, torch.tensor([7])])
        assert device.to_host.count == 1
        assert [list(array) for array in found] == [[0, 1, 2], [0, 1, 2], [0.0, 1.0, 2.0], [7]]
        # The host's own memory is not copied to be read.
        own = torch.zeros(2, dtype=torch.uint8)
        fetch([own])[0][0] = 9
        assert own.tolist() == [9, 0]


def test_places_and_counts_are_found_without_asking_the_device():
    flags = torch.tensor([False, True, True, False, True])
    index = torch.tensor([3, 0, 3])
    with StandIn() as device:
        there = flags.to(DEVICE), index.to(DEVICE)
        device.forget()
        places, counts = flagged(there[0], 3), counts_of(there[1], 5)
        assert device.to_host.count == 0
        assert places.cpu().tolist() == flagged(flags, 3).tolist() == [1, 2, 4]
        assert counts.cpu().tolist() == counts_of(index, 5).tolist() == [1, 0, 0, 2, 0]


@given(codes=st.lists(st.integers(0, 255), max_size=40), width=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_codes_are_packed_as_numpy_packs_them(codes, width):
    codes = [c % (1 << width) for c in codes]
    array = np.array(codes, dtype=np.uint8)
    packed = packing.pack(torch.from_numpy(array), width)
    assert bytes(packed.tolist()) == pack_codes(array, width)
    assert packing.unpack(packed, len(codes), width).tolist() == codes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_when_the_sums_have_crossed(bad):
    fine, spoiled = torch.full((4,), 3e38), torch.tensor([1.0, bad])
    with StandIn() as device:
        there = [x.to(DEVICE) for x in (fine, spoiled, fine)]
        device.forget()
        checks = Checks()
        assert all([checks.add(x) for x in there])  # noqa: C419 - all are added
        assert device.to_host.count == 0
        assert checks.results(fetch(checks.sums)) == [True, False, True]
        assert device.to_host.count == 1
        for text in ("sign(scale=row)", "topk(density=0.5) | sign(scale=tensor)", "float32"):
            with pytest.raises(UsageError, match="not finite"):
                codec.parse(text).encode(there[1])
    assert each_finite([fine, spoiled]) == [True, False]


@pytest.mark.parametrize(
    ("text", "damage", "message"),
    [
        ("ternary", lambda body: body[:2] + b"\xff" + body[3:], "not five digits"),
        ("int(bits=4)", lambda body: body[:2] + b"\xff" + body[3:], "code 15, over 14"),
        ("float32", lambda body: b"\x00\x00\xc0\x7f" + body[4:], "is not finite"),
        ("sign(scale=row)", lambda body: b"\x80\x7f" + body[2:], "scale is not finite"),
        ("sign(scale=row)", lambda body: body[:-1], "bytes of values"),
    ],
)
def test_damage_is_named_by_a_device_as_by_the_cpu(text, damage, message):
    chosen, shape = codec.parse(text), (6, 5)
    body = damage(chosen.encode_body(made(shape)).body)
    packed = payload.pack(str(chosen), [(shape, torch.float32, body)])
    with pytest.raises(PayloadError, match=message) as on_cpu:
        chosen.decode(packed)
    with StandIn(), pytest.raises(PayloadError, match=message) as there:
        chosen.decode(packed, device=DEVICE)
    assert str(there.value) == str(on_cpu.value)
    # Whoever decodes without a wait gets the error at once, or NaN.
    with StandIn():
        if message in ("scale is not finite", "bytes of values"):
            with pytest.raises(PayloadError, match=message):
                chosen.decode_body(body, shape, device=DEVICE)
        else:
            assert each_finite([chosen.decode_body(body, shape, device=DEVICE)]) == [False]


def test_a_payload_decodes_on_a_device_to_its_dtype():
    chosen = codec.parse("sign(scale=row)")
    x = made((8, 8), dtype=torch.bfloat16)
    with StandIn():
        assert chosen.encode(x.to(DEVICE)) == chosen.encode(x)
        there = chosen.decode(chosen.encode(x), device=DEVICE)
        assert there.dtype == torch.bfloat16
        assert there.device == DEVICE
        assert torch.equal(there.cpu(), chosen.decode(chosen.encode(x)))


def test_a_body_holds_what_the_tensor_held_when_it_was_encoded():
    """A residual, of which what was sent is taken off at once, is the tensor itself."""
    x = made((8, 8))
    for text in QUANTIZERS:
        chosen = codec.parse(text)
        with StandIn():
            there = x.to(DEVICE)
            encoded = chosen.encode_body(there)
            there.zero_()
            assert encoded.body == chosen.encode_body(x).body


def test_the_stand_in_refuses_and_rounds_as_cuda_does():
    x, limit = torch.tensor([0.3, 0.7, 5.0]), torch.tensor(1.0)
    with StandIn():
        there = x.to(DEVICE)
        # Of these two torch looks at the devices of one alone.
        assert torch.minimum(there, limit).cpu().tolist() == x.clamp(max=1).tolist()
        with pytest.raises(RuntimeError, match="same device"):
            there.clamp(max=limit)
        assert torch.equal((there / 3).cpu(), x * torch.tensor(3.0).reciprocal())
        assert not torch.equal((there / 3).cpu(), x / 3)
        assert torch.equal(host.quotient(there, 3).cpu(), x / 3)


@pytest.mark.parametrize("text", ["ternary(scale=row)", "codebook(bits=2)", "topk(k=5) | sign(scale=row)"])
def test_scales_are_found_where_deterministic_algorithms_are_asked_for(text):
    chosen, x = codec.parse(text), made((12, 16))
    torch.set_deterministic_debug_mode("error")
    try:
        with StandIn():
            assert chosen.encode_body(x.to(DEVICE)).body == chosen.encode_body(x).body
    finally:
        torch.set_deterministic_debug_mode("default")


def test_running_sums_are_those_of_cumsum():
    terms = torch.arange(14.0).view(2, 7)
    with StandIn():
        assert torch.equal(running_sums(terms.to(DEVICE)).cpu(), terms.cumsum(-1))


@pytest.mark.parametrize(
    "text", ["int(bits=3, scale=row)", "codebook(bits=2, fit=gaussian)", "dct | topk(k=4) | sign(scale=none)"]
)
def test_codecs_do_without_the_device_that_the_program_has_as_its_default(text):
    """As after torch.set_default_device: what has no device named is made there, and would have to be read back."""
    chosen, x = codec.parse(text), made((12, 16))
    with StandIn() as device, DEVICE:
        there = x.to(DEVICE)
        device.forget()
        encoded = chosen.encode_body(there)
        body = encoded.body
        assert torch.equal(encoded.decoded, chosen.decode_body(body, (12, 16), device=DEVICE))
        # The bytes, and what was compared.
        assert device.to_host.count == 2


@pytest.mark.parametrize(
    "text", ["sign(scale=row)", "dct(chunk=4) | topk(k=4) | int(bits=4)", "lowrank(rank=2) | bfloat16"]
)
def test_a_device_without_float64_gets_the_bits_of_the_cpu(text, monkeypatch):
    chosen, x = codec.parse(text), made((12, 16))
    on_cpu = chosen.encode_body(x, seed=3, state=chosen.init((12, 16)))
    with StandIn(float64=False):
        with pytest.raises(TypeError, match="float64"):
            x.to(DEVICE).double()
        monkeypatch.setattr(host, "WITHOUT_FLOAT64", {DEVICE.type})
        encoded = chosen.encode_body(x.to(DEVICE), seed=3, state=chosen.init((12, 16)))
        assert encoded.body == on_cpu.body
        for there in (encoded.decoded, chosen.mean_bodies([encoded.body], (12, 16), device=DEVICE)):
            assert there.device == DEVICE
            assert torch.equal(there.cpu(), on_cpu.decoded)
        assert each_finite([x.to(DEVICE), x.to(DEVICE) / 0]) == [True, False]


@pytest.mark.parametrize("text", PLAIN)
def test_the_host_knows_a_bound_of_what_a_device_decodes(text):
    chosen, shape = codec.parse(text), (48, 64)
    x = made(shape)
    bodies = [chosen.encode_body(scale * x, seed=3).body for scale in (1, 4)]
    with StandIn() as device:
        values, bound = chosen.bounded_mean(bodies, shape, device=DEVICE)
        assert device.to_host.count == 0
        largest = float(values.abs().max().cpu())
    unknown = text.startswith(("lowrank", "int(bits=3"))
    assert math.isinf(bound) if unknown else largest <= bound * (1 + 1e-6)
    here = chosen.bounded_mean(bodies, shape)
    assert float(here.values.abs().max()) <= here.bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("ternary", lambda body: body[:3] + b"\xf3" + body[4:]),
        ("int(bits=2)", lambda body: body[:3] + b"\x0c" + body[4:]),
        ("int(bits=4)", lambda body: body[:3] + b"\xf0" + body[4:]),
        ("int(bits=8)", lambda body: body[:3] + b"\xff" + body[4:]),
        ("float32", lambda body: body[:6] + b"\xc0\x7f" + body[8:]),
        ("bfloat16", lambda body: body[:6] + b"\x80\xff" + body[8:]),
        ("float64", lambda body: body[:14] + b"\xf8\x7f" + body[16:]),
    ],
)
def test_of_a_value_that_is_none_no_bound_is_known(text, wrong):
    chosen, shape = codec.parse(text), (4, 5)
    body = chosen.encode_body(made(shape)).body
    with StandIn():
        assert math.isfinite(chosen.bounded_mean([body], shape, device=DEVICE).bound)
        values, bound = chosen.bounded_mean([body, wrong(body)], shape, device=DEVICE)
        assert math.isinf(bound)
        assert each_finite([values]) == [False]
