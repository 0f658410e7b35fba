"""The messages between a replica and an owner: small, whole, and hostile until they are read."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muonwire.codec import parse, parts, sums
from muonwire.errors import PayloadError

SHAPES = st.lists(st.lists(st.integers(0, 300), max_size=4).map(tuple), max_size=6)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), shapes=SHAPES, text=st.text(max_size=60))
def test_what_is_packed_is_unpacked_and_measured(data, shapes, text):
    bodies = [data.draw(st.binary(max_size=300)) for _ in shapes]
    message = parts.pack(text, shapes, bodies)
    assert parts.unpack(message, codec_text=text, shapes=shapes) == bodies
    assert len(message) == parts.num_bytes([len(b) for b in bodies])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shapes=SHAPES)
def test_whatever_is_changed_is_noticed(data, shapes):
    bodies = [data.draw(st.binary(max_size=40)) for _ in shapes]
    message = parts.pack("float32", shapes, bodies)
    kind = data.draw(st.sampled_from(["change", "cut", "add", "shapes", "codec"]))
    text = "float32"
    if kind == "change" and message:
        at = data.draw(st.integers(0, len(message) - 1))
        message = message[:at] + bytes([message[at] ^ data.draw(st.integers(1, 255))]) + message[at + 1 :]
    elif kind == "cut" and message:
        message = message[: data.draw(st.integers(0, len(message) - 1))]
    elif kind == "shapes":
        shapes = [*shapes, (3,)]
    elif kind == "codec" and shapes:
        text = "bfloat16"
    else:
        message += b"\0"
    with pytest.raises(PayloadError):
        parts.unpack(message, codec_text=text, shapes=shapes)


def test_two_pieces_of_nine_hundred_bytes_take_nine_more():
    assert parts.num_bytes([700, 200]) == 900 + 5 + 2 + 2


def test_a_refusal_is_an_error_with_its_reason_wherever_it_is_read():
    for shapes in ([], [(3,)]):
        with pytest.raises(PayloadError, match=r"refuses what it was sent: from replica 1: ä"):
            parts.unpack(parts.refuse("from replica 1: ä"), codec_text="float32", shapes=shapes)
    assert len(parts.refuse("ü" * 10_000)) <= 1 + parts.LARGEST_REFUSAL_BYTES
    with pytest.raises(PayloadError) as caught:
        parts.unpack(b"\0" + b"\xff" * (1 << 20), codec_text="float32", shapes=[])
    assert len(str(caught.value)) < 5000


COUNTS = st.integers(1, 70).flatmap(
    lambda replicas: st.tuples(
        st.just(replicas), st.lists(st.integers(0, replicas), min_size=1, max_size=400).map(np.array)
    )
)


@settings(max_examples=100, deadline=None)
@given(made=COUNTS)
def test_sums_come_back_as_they_were(made):
    replicas, counts = made
    body = sums.pack(counts, replicas)
    again, senders = sums.unpack(body, len(counts), largest=replicas)
    assert senders == replicas
    assert np.array_equal(again, counts)


@pytest.mark.parametrize("replicas", [2, 4, 8, 16, 64])
def test_sums_of_independent_signs_take_their_entropy(replicas):
    """Within what the table of frequencies and a coder's ends cost: two bytes a sum and eight."""
    count = 7200
    counts = np.random.default_rng(0).binomial(replicas, 0.5, count)
    found = len(sums.pack(counts, replicas))
    entropy = count * sums.entropy_bits(replicas) / 8
    assert found <= 1.005 * entropy + 2 * (counts.max() - counts.min() + 1) + 8
    assert found == pytest.approx(sums.estimate_bytes(count, replicas), rel=0.01)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), made=COUNTS)
def test_hostile_sums_are_sums_or_payload_errors(data, made):
    replicas, counts = made
    body = bytearray(sums.pack(counts, replicas))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(body[: data.draw(st.integers(0, len(body)))]) if data.draw(st.booleans()) else bytes(body)
    tracemalloc.start()
    try:
        again, senders = sums.unpack(body, len(counts), largest=70)
    except PayloadError:
        pass
    else:
        assert len(again) == len(counts)
        assert again.min() >= 0
        assert again.max() <= senders <= 70
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 64 * len(counts) + 256 * len(body) + (1 << 17)


def test_a_span_that_nobody_can_have_sent_is_refused_before_its_table_is_read():
    for body in (b"\xff\xff\xff\xff\xff\x0f\x00\x01", b"\x03\x00\xff\xff\xff\xff\x0f", b"\x00\x00\x00"):
        with pytest.raises(PayloadError, match="replicas have sent"):
            sums.unpack(body, 10, largest=70)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 16, 64, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-30, 0.3])
def test_the_mean_has_the_bits_of_a_sum_in_any_order(replicas, scale):
    generator = torch.Generator().manual_seed(replicas)
    signs = torch.randint(2, (replicas, 50), generator=generator) * 2 - 1
    shared = torch.tensor(scale).bfloat16().float()
    codec = parse("sign(scale=shared)")
    bodies = [
        codec.encode_body(s.float(), state={"scale": shared}).body
        for s in signs[torch.randperm(replicas, generator=generator)]
    ]
    gathered = codec.mean_bodies(bodies, (50,))
    own = sums.mean((signs > 0).sum(0).numpy(), replicas, scale=shared.item())
    assert torch.equal(gathered.view(torch.int32), own.view(torch.int32))
